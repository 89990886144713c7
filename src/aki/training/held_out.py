"""The questions that a model is measured on: drawn from the sources that a recipe holds out, or DigitScenes' own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from aki.data.collate import ChatCollator
from aki.data.digits import DigitScenes
from aki.data.mixture import Samples, mixture_weights, try_sample
from aki.data.report import BadSample, DataReport, Reason
from aki.data.schema import Sample
from aki.layout import IGNORE_INDEX
from aki.models import AkiProcessor
from aki.training.data import open_sources
from aki.training.recipe import Recipe, RecipeError, StageRecipe

SEED = 0
"""Of what is drawn: whatever a recipe's seed, all its runs are asked the same."""
VALIDATION_SEED, TEST_SEED = 0, 1
"""Of scenes."""


@dataclass(frozen=True)
class HeldOut:
    """Questions, none of them in both parts.

    Attributes:
        report: of the samples that were looked at, where they come from sources.
    """

    validation: Dataset[Sample]
    test: Dataset[Sample]
    report: DataReport | None = None

    def summary(self) -> dict[str, Any]:
        """How many there are, and what was skipped, for a person; JSON."""
        assert self.report is not None
        return {
            "validation": len(self.validation),  # type: ignore[arg-type]
            "test": len(self.test),  # type: ignore[arg-type]
            "sources": sorted(self.report.sources),
            "skipped": self.report.summary(),
        }


def held_out(recipe: Recipe, stage: StageRecipe, collator: ChatCollator) -> HeldOut | None:
    """
    Args:
        collator: of the order in which the stage is measured.

    Returns:
        None where nothing is asked: the stage learns captions, or trains on other data than DigitScenes and nothing is
        held out.

    Raises:
        SourceError: a source that is not there.
        RecipeError: too few samples for both parts.
        TooManyBadSamples: of them.
    """
    data = recipe.data
    if stage.task != "question":
        return None
    if data.held_out:
        sources = open_sources(recipe, data.held_out, SEED)
        weights = mixture_weights("weights", [one.weight for one in data.held_out], None)
        return choose(sources, weights, (data.eval_size, data.test_size), collator, stage.max_bad_share)
    if stage.sources or stage.shards:
        return None
    assert isinstance(collator.processor, AkiProcessor)
    return HeldOut(
        scenes(recipe, collator.processor, data.eval_size, VALIDATION_SEED),
        scenes(recipe, collator.processor, data.test_size, TEST_SEED),
    )


def scenes(recipe: Recipe, processor: AkiProcessor, size: int, seed: int) -> DigitScenes:
    """Questions about handwriting that no stage trains on."""
    return DigitScenes("test", "question", size, processor.image_processor.size["height"], recipe.data.grid, seed)


@dataclass(frozen=True)
class Chosen(Dataset):
    """Samples picked out of sources.

    Attributes:
        picks: (source, index in it).
    """

    sources: Sequence[Samples]
    picks: Sequence[tuple[int, int]]

    def __len__(self) -> int:
        return len(self.picks)

    def __getitem__(self, number: int) -> Sample:
        source, index = self.picks[number]
        return self.sources[source].sample(index, epoch=0)


def choose(
    sources: Sequence[Samples],
    weights: np.ndarray,
    sizes: tuple[int, int],
    collator: ChatCollator,
    max_bad_share: float,
) -> HeldOut:
    """Draw questions for validation and test without overlap; a small source is split in the proportion of the two.

    Args:
        weights: (sources,) the shares of them.
        sizes: at most so many questions a part.

    Raises:
        RecipeError: a part gets none.
        TooManyBadSamples: a larger share cannot be used.
    """
    report = DataReport(max_bad_share)
    # Whole numbers that add up, whatever the weights.
    wanted = [np.diff(np.floor(np.cumsum([0, *weights]) * size + 1e-9).astype(int)) for size in sizes]
    picks: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])
    for number, source in enumerate(sources):
        order = np.random.default_rng([SEED, number]).permutation(len(source)).tolist()
        # Each part has a stretch of its own, so that a bad sample in one moves nothing in the other.
        middle = -(-len(order) * sizes[0] // sum(sizes))
        for part, stretch in enumerate((order[:middle], order[middle:])):
            good = (index for index in stretch if usable(source, index, collator, report))
            picks[part].extend((number, index) for index in islice(good, wanted[part][number]))
    report.check()
    for name, picked in zip(("validation", "test"), picks, strict=True):
        if not picked:
            raise RecipeError(f"data.held_out has no question left for {name}: {report.summary()}; hold out more.")
    return HeldOut(Chosen(sources, picks[0]), Chosen(sources, picks[1]), report)


def usable(source: Samples, index: int, collator: ChatCollator, report: DataReport) -> bool:
    """Whether a sample can be asked, its whole answer within `max_length`; the report counts it either way."""

    def use(sample: Sample) -> bool:
        row, shortened = collator.encode(sample)
        if shortened or not (row["labels"] != IGNORE_INDEX).any():
            raise BadSample(Reason.ANSWER_LOST, f"it has no whole answer within max_length {collator.max_length}.")
        report.used(sample.source)
        return True

    return bool(try_sample(lambda: source.sample(index, epoch=0), use, report))
