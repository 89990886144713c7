"""What a recipe says of data: sources, shards, and what is held out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from aki.data.augment import Augment
from aki.training.recipe.errors import RecipeError


@dataclass
class SourceRecipe:
    """A data set of chats, read by one of `aki.data.sources`.

    Attributes:
        kind: which reader, as `vqav2`.
        annotations: its files as released, in the reader's order, or the folder that they lie in.
        images: the folder of its pictures, or several.
        weight: how often it is drawn, relative to the other sources of the stage.
        name: what counts and messages call it; the kind if absent.
        augment: changes of the pictures; none if absent.
        options: what the kind takes beyond that.
    """

    kind: str
    annotations: tuple[str, ...]
    images: tuple[str, ...] = ()
    weight: float = 1.0
    name: str | None = None
    augment: Augment | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class ShardsRecipe:
    """Captioned pictures in webdataset tars.

    Attributes:
        kind: how a caption is written: kale, ocr or grounding (`aki.data.shards`).
        urls: paths, brace ranges (`{000..099}.tar`), or any URL that webdataset opens.
        weight: how often it is drawn, relative to the other shards of the stage.
        name: what counts and messages call it; the kind if absent.
    """

    kind: str
    urls: tuple[str, ...]
    weight: float = 1.0
    name: str | None = None


@dataclass
class DataRecipe:
    """DigitScenes, and the questions that models are measured on.

    Attributes:
        grid: digits a side.
        eval_size: at most so many held-out questions for validation: learning curves and the choice of a learning rate.
        test_size: at most so many others for the final numbers.
        held_out: sources of these questions, in shares of their weights. If absent they are DigitScenes' own, of a
            stage that trains on DigitScenes.
    """

    grid: int = 3
    eval_size: int = 600
    test_size: int = 3000
    held_out: tuple[SourceRecipe, ...] = ()

    def __post_init__(self) -> None:
        for name in ("eval_size", "test_size"):
            if getattr(self, name) < 1:
                raise RecipeError(f"data.{name} must be at least 1, it is {getattr(self, name)}.")


def check_weights(name: str, data: Sequence[SourceRecipe | ShardsRecipe]) -> None:
    weights = [one.weight for one in data]
    if weights and not (all(0 <= weight < math.inf for weight in weights) and any(weights)):
        raise RecipeError(f"the weights of {name} are numbers from 0 on, not all zero; they are {weights}.")
