"""A stage's data without its model, to look at before training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

from aki.data.check import Indexed
from aki.data.collate import ChatCollator
from aki.data.digits import DigitScenes
from aki.data.mixture import Mixture
from aki.data.schema import Sample
from aki.data.shards import ShardMixture, ShardSet
from aki.layout import IGNORE_INDEX
from aki.models import AkiProcessor
from aki.prompts.blocks import PromptBlockWriter
from aki.prompts.scopes import add_scope_tokens
from aki.training.data import open_samples, stage_collators, texts
from aki.training.model import build_processor
from aki.training.recipe import Recipe, RecipeError, StageRecipe
from aki.training.start import has_scopes, load_processor

Used = TypeVar("Used")


@dataclass(frozen=True)
class StageView:
    """What a stage trains on.

    Attributes:
        sources: each with its name.
        samples: their mixture, or the only source itself where there is none.
    """

    processor: AkiProcessor | PromptBlockWriter
    collator: ChatCollator
    sources: Sequence[tuple[str, Indexed | ShardSet]]
    samples: Mixture | ShardMixture | DigitScenes

    def first(self, size: int, use: Callable[[Sample], Used]) -> list[Used]:
        """What `use` makes of the first samples that training sees.

        Raises:
            GaveUp: none of many samples can be used.
        """
        if isinstance(self.samples, DigitScenes):
            return [use(self.samples[index]) for index in range(min(size, len(self.samples)))]
        return self.samples.peek(size, use)


def tokens_of(collator: ChatCollator, sample: Sample) -> str:
    """A sample's tokens as the tokenizer spells them; learned ones in brackets, media as one with their number.

    Raises:
        BadSample: it cannot be used.
    """
    row, _ = collator.encode(sample)
    media = set(collator.processor.media_token_ids)
    spelled: list[str] = []
    ids, learned = row["input_ids"][0].tolist(), (row["labels"][0] != IGNORE_INDEX).tolist()
    for (token, answer), run in groupby(zip(ids, learned, strict=True)):
        text, count = collator.processor.tokenizer.convert_ids_to_tokens(token), len(list(run))
        text = f"[{text}]" if answer else text
        spelled += [f"{text} x {count}"] if token in media else [text] * count
    return " ".join(spelled)


def stage_view(recipe: Recipe, name: str) -> StageView:
    """
    Raises:
        SourceError, ShardError: data that is not there.
        RecipeError: nor is the model that the recipe starts from.
    """
    stage = recipe.stage(name)
    samples = open_samples(recipe, stage, 1, {})
    processor: AkiProcessor | PromptBlockWriter
    if recipe.model.pretrained is not None:
        processor = load_processor(recipe.model.pretrained)
    elif recipe.start_from is None:
        processor = build_processor(recipe, None if samples is None else texts(samples))
    elif (Path(recipe.start_from) / "processor_config.json").exists():
        processor = AkiProcessor.from_pretrained(recipe.start_from)
    else:
        raise RecipeError(
            f"{recipe.start_from} holds no processor: run the stage before it first, or name another folder with "
            "--start-from, or look with --tiny, which needs none."
        )
    if has_scopes(stage.rule):
        add_scope_tokens(processor.tokenizer)
    collator = stage_collators(processor, stage, recipe.seed)[0]
    if samples is None:
        assert isinstance(processor, AkiProcessor)
        scenes = training_scenes(recipe, stage, processor)
        return StageView(processor, collator, [("digits", scenes)], scenes)
    sources: Sequence[Any] = samples.sets if isinstance(samples, ShardMixture) else samples.sources
    return StageView(processor, collator, [(source.name, source) for source in sources], samples)


def training_scenes(recipe: Recipe, stage: StageRecipe, processor: AkiProcessor) -> DigitScenes:
    """The scenes of a stage that names no data, as many as it takes."""
    size = stage.number_of_steps * stage.batch_size * stage.gradient_accumulation_steps * recipe.devices
    pixels = processor.image_processor.size["height"]
    return DigitScenes("train", stage.task, size, pixels, recipe.data.grid, recipe.seed)
