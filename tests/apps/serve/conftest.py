import pytest
import torch
from serving import make_lively, running

from aki.apps.serve.engine import Engine
from aki.training.recipe import load_recipe
from aki.training.stages import build_model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A folder as the quickstart leaves it, of a tiny model with random weights."""
    recipe = load_recipe("digits")
    recipe.model.vision |= {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    recipe.model.vision |= {"num_attention_heads": 2}
    recipe.model.text |= {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    torch.manual_seed(0)
    model, processor = build_model(recipe)
    make_lively(model)
    folder = tmp_path_factory.mktemp("served") / "tiny"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def engine(model_folder):
    engine = Engine.from_folder(str(model_folder), unlocked=False)
    # Rounding differs with the size of a batch; in float64 it decides no token, so what differs is a fault.
    engine.model.double()
    return engine


@pytest.fixture(scope="session")
def port(engine):
    with running(engine) as port:
        yield port
