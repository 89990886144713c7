from dataclasses import replace

import hypothesis
import pytest
import torch

from aki.training.recipe import load_recipe

# A shared machine makes deadlines a coin toss; the same examples on every run make a failure repeatable.
hypothesis.settings.register_profile("aki", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("aki")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _cut_off_pictures_are_errors():
    """Pillow's default, which importing lmms-eval changes for the whole process."""
    # Not the test's own `monkeypatch`, which would then be undone after the fixtures that it is meant to end before.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("PIL.ImageFile.LOAD_TRUNCATED_IMAGES", False)
        yield


@pytest.fixture
def tiny_recipe():
    """The digits recipe with tiny parts and a few steps."""
    recipe = load_recipe("digits")
    recipe.model.vision |= {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    recipe.model.text |= {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    recipe.data.eval_size, recipe.data.test_size, recipe.workers = 12, 12, 0
    short = {"batch_size": 4, "log_every": 1, "warmup_steps": 2}
    recipe.pretrain = replace(recipe.pretrain, steps=4, save_every=2, **short)
    recipe.sft = replace(recipe.sft, steps=6, save_every=2, eval_every=3, **short)
    return recipe
