"""The model that a stage starts from: whether it is one, and the one that the recipe speaks of."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from aki.models import AkiConfig, AkiForConditionalGeneration
from aki.models.adapters import adapter_of
from aki.training.folder import RESULT, RunError, training_folder
from aki.training.model import model_config
from aki.training.recipe import Recipe

_PARTS = ("vision", "text", "connector")
_TOKENIZERS = ("vocab_size",)
"""What the tokenizer decides, whatever a recipe says."""


def check_start(recipe: Recipe, folder: Path) -> None:
    """
    Raises:
        RunError: the folder holds no whole model, or one of other sizes than the recipe's; they are named.
        RecipeError: the recipe's own sizes make no model.
    """
    if not (folder / "config.json").exists():
        base = adapter_of(folder)
        if base is not None:
            raise RunError(f"{folder} holds an adapter alone: merge it into {base} first, and start from that.")
        raise RunError(f"{folder} holds no model to start from: run the stage before it first.")
    if (training_folder(folder) / "run.json").exists() and not (folder / RESULT).exists():
        raise RunError(f"{folder} holds a run that is not finished: go on with it first, with --resume.")
    kind = PreTrainedConfig.get_config_dict(folder)[0].get("model_type")
    if kind != AkiConfig.model_type:
        raise RunError(f"{folder} holds a model of type {kind!r}, not an AKI model to start from.")
    differences = list(_differences(recipe, AkiConfig.from_pretrained(folder)))
    if differences:
        shown = "; ".join(differences[:3]) + (f", and {len(differences) - 3} more" if len(differences) > 3 else "")
        raise RunError(f"{folder} holds another model than the recipe's: {shown}. Correct the recipe, or --start-from.")


def _differences(recipe: Recipe, found: AkiConfig) -> Iterator[str]:
    """What the recipe says of the model and is not so; where it says nothing, the weights' shapes."""
    wanted = model_config(recipe.model)
    said = False
    for part in _PARTS:
        ours, theirs = (getattr(config, f"{part}_config") for config in (wanted, found))
        for field in getattr(recipe.model, part):
            value, actual = (getattr(config, field, None) for config in (ours, theirs))
            if field not in _TOKENIZERS and value != actual:
                said = True
                yield f"it has {field} {actual}, model.{part} says {value}"
    if said:
        return
    for field in _TOKENIZERS:
        setattr(wanted.text_config, field, getattr(found.text_config, field))
    ours, theirs = _shapes(wanted), _shapes(found)
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            yield f"its {name} is {_shape(theirs.get(name))}, the recipe's {_shape(ours.get(name))}"


def _shapes(config: AkiConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = AkiForConditionalGeneration(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _shape(shape: Any) -> str:
    return "absent" if shape is None else " x ".join(map(str, shape))
