import re

import numpy as np
import pytest
import torch
from PIL import Image

from aki.apps.chat import Chat
from aki.training.stages import build_model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A tiny model with random weights, which never ends an answer by itself, and a picture."""

    from aki.training.recipe import load_recipe

    recipe = load_recipe("digits")
    recipe.model.text |= {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    torch.manual_seed(0)
    model, processor = build_model(recipe)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    # Plain words alone, which a terminal shows as they are.
    texts = [processor.tokenizer.decode([token]) for token in range(len(processor.tokenizer))]
    odd = [token for token, text in enumerate(texts) if not re.fullmatch(" [a-z]{3,}", text)]
    model.generation_config.suppress_tokens = odd
    folder = tmp_path_factory.mktemp("apps") / "model"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    scene = np.random.default_rng(0).integers(0, 255, (24, 24, 3), dtype=np.uint8)
    Image.fromarray(scene).save(folder.parent / "scene.png")
    return folder


@pytest.fixture
def scene(model_folder):
    return model_folder.parent / "scene.png"


@pytest.fixture
def chat(model_folder):
    from aki.apps.chat import load

    return Chat(*load(model_folder), max_new_tokens=12)
