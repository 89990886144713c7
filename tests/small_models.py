"""AKI as the digits recipe makes it, small enough for a test."""

from collections.abc import Iterable

import torch

from aki import AkiForConditionalGeneration, AkiProcessor
from aki.training.model import build_model
from aki.training.recipe import load_recipe


def small_aki(texts: Iterable[str] | None = None) -> tuple[AkiForConditionalGeneration, AkiProcessor]:
    """
    Args:
        texts: what its tokenizer is trained on; DigitScenes' if absent.
    """
    recipe = load_recipe("digits")
    recipe.model.text |= {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    torch.manual_seed(0)
    return build_model(recipe, texts)


@torch.no_grad()
def enlarge(model: torch.nn.Module) -> None:
    """Random weights so large that what is answered depends on what is asked."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.3)
