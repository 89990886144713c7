"""What a stage trains on: DigitScenes, a mixture of sources, or shards; and where a resumed run goes on in it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch

from aki.data.collate import ChatCollator
from aki.data.feed import Feed, Loader, Position
from aki.data.mixture import Mixture, Samples, mixture_weights
from aki.data.orders import ORDERS, template_in_order
from aki.data.pack import RopeIndex
from aki.data.packing import Row, join, kinds_of
from aki.data.report import DataReport
from aki.data.shards import ShardMixture, open_shards
from aki.data.sources import open_source
from aki.layout import IGNORE_INDEX
from aki.models import AkiProcessor
from aki.prompts.blocks import PromptBlockWriter
from aki.training.recipe import Recipe, RecipeError, SourceRecipe, StageRecipe

REPORT = "data_report.json"
LOOKED_AT = 64
"""Samples in which media are looked for before training."""


class ResumeError(ValueError):
    """A run that cannot go on as it was started."""


def open_samples(
    recipe: Recipe, stage: StageRecipe, ranks: int, places: dict[str, Any]
) -> Mixture | ShardMixture | None:
    """The samples of a stage, or None where it trains on DigitScenes.

    Args:
        places: from the checkpoint's `Position`.

    Raises:
        SourceError, ShardError: a file, folder or kind that is not there.
    """
    if stage.shards:
        weights = mixture_weights(stage.mixture, [one.weight for one in stage.shards], None)
        sets = [
            open_shards(one.kind, [below(recipe.root, url) for url in one.urls], one.name or one.kind)
            for one in stage.shards
        ]
        return ShardMixture(sets, weights, recipe.seed, max(recipe.workers, 1), ranks, places)
    if not stage.sources:
        return None
    sources = open_sources(recipe, stage.sources, recipe.seed)
    weights = mixture_weights(stage.mixture, [one.weight for one in stage.sources], [len(source) for source in sources])
    return Mixture(sources, weights, recipe.seed)


def open_sources(recipe: Recipe, sources: Sequence[SourceRecipe], seed: int) -> list[Samples]:
    """
    Args:
        seed: of what is drawn in a sample.

    Raises:
        SourceError: a file, folder or kind that is not there.
    """
    return [
        open_source(
            one.kind,
            annotations=[below(recipe.root, path) for path in one.annotations],
            images=[below(recipe.root, path) for path in one.images],
            name=one.name,
            seed=seed,
            augment=one.augment,
            cache=recipe.cache,
            **one.options,
        )
        for one in sources
    ]


def counted(recipe: Recipe, stages: Iterable[str]) -> Recipe:
    """The recipe with the steps of stages that say epochs, for which their sources are opened.

    Raises:
        SourceError: a source that is not there.
    """
    for name in stages:
        stage = recipe.stage(name)
        if stage.epochs is not None:
            samples = sum(len(source) for source in open_sources(recipe, stage.sources, recipe.seed))
            a_step = stage.batch_size * stage.gradient_accumulation_steps * recipe.devices
            steps = max(1, round(stage.epochs * samples / a_step))
            of_stage: dict[str, Any] = {name: replace(stage, steps=steps, epochs=None)}
            recipe = replace(recipe, **of_stage)
    return recipe


def below(root: str, path: str) -> str:
    """A relative path below the root; an absolute one and a URL as they are."""
    return path if urlparse(path).scheme else str(Path(root) / path)


def stage_collators(
    processor: AkiProcessor | PromptBlockWriter, stage: StageRecipe, seed: int = 0
) -> list[ChatCollator]:
    """What makes model inputs of the stage's samples, one a copy that it trains; by the first it is measured.

    Args:
        seed: of the cuts in captions.

    Raises:
        RecipeError: the stage asks of another family's model what only AKI's processor does.
    """
    if isinstance(processor, PromptBlockWriter):
        _check_other(stage)
        return [ChatCollator(processor, stage.max_length)]
    name = "caption" if stage.task == "caption" else None
    collators = [
        ChatCollator(processor, stage.max_length, template_in_order(processor, name, order), stage.seen, seed=seed)
        for order in ORDERS[stage.order]
    ]
    return collators + [replace(one, seen=0.0, causal=True) for one in collators if stage.also_causal]


def _check_other(stage: StageRecipe) -> None:
    """
    Raises:
        RecipeError: what a processor that is not AKI's has no way to do.
    """
    asked = {
        f"order: {stage.order}": stage.order != "image_first",
        "seen": stage.seen > 0,
    }
    for name, there in asked.items():
        if there:
            raise RecipeError(f"{name} is for AKI's own models: leave it out, others are trained as published.")
    if not (stage.sources or stage.shards):
        raise RecipeError("a stage of a model that is not AKI's names its data, sources or shards: there are none.")


def stage_loader(
    samples: Mixture | ShardMixture,
    collators: Sequence[ChatCollator],
    recipe: Recipe,
    stage: StageRecipe,
    rank: int,
    ranks: int,
    position: Position,
    pin_memory: bool = False,
    rope_index: RopeIndex | None = None,
    meets: bool = False,
) -> Loader:
    """The batches of one process.

    Args:
        rope_index: as of a `Feed`.
        meets: with the other processes in every part of the model, so that no batch may lack media.
    """
    collators = [replace(collator, raw_pixels=collator.fast is not None) for collator in collators]
    row_tokens = stage.row_tokens if stage.packing else None
    feed = Feed(
        samples,
        collators,
        stage.batch_size,
        row_tokens,
        rank,
        ranks,
        rope_index=rope_index,
        padding_free=stage.padding_free,
    )
    if meets:
        feed = replace(feed, spares=_spares(feed, samples))
    return Loader(feed, recipe.workers, position, stage.max_bad_share, pin_memory)


def _spares(feed: Feed, samples: Mixture | ShardMixture) -> list[Row]:
    """The shortest of the first samples with each kind of media, with nothing to be learned."""
    rows = samples.peek(LOOKED_AT, lambda sample: feed.collators[0].encode(sample)[0])
    shortest: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: row["input_ids"].shape[1]):
        shortest = dict.fromkeys(kinds_of([row]), row) | shortest
    spares = {id(row): row | {"labels": torch.full_like(row["labels"], IGNORE_INDEX)} for row in shortest.values()}
    placed = [feed.placed(row) for row in spares.values()]
    return placed if feed.row_tokens is None else [join([row]) for row in placed]


def texts(samples: Mixture | ShardMixture, size: int = 300) -> Iterator[str]:
    """Of some samples, for training a tokenizer."""
    for sample in samples.peek(size, lambda sample: sample):
        for message in sample.messages:
            yield from (part["text"] for part in message["content"] if part["type"] == "text")


def save_position(folder: Path, loader: Loader, rank: int, ranks: int) -> None:
    """Write into a checkpoint where this process stands in its data."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {"ranks": ranks, "workers": loader.workers, "position": asdict(loader.position)}
    _position_file(folder, rank).write_text(json.dumps(values))


def load_position(checkpoint: Path | None, recipe: Recipe, stage: StageRecipe, rank: int, ranks: int) -> Position:
    """Where a process goes on.

    Raises:
        ResumeError: shards or packed rows, which depend on the number of processes (and shards on that of workers).
    """
    if checkpoint is None or not (stage.sources or stage.shards):
        return Position()
    saved = json.loads(_position_file(checkpoint, 0).read_text())
    then, now = (saved["ranks"], saved["workers"]), (ranks, recipe.workers)
    if stage.shards and then != now:
        raise ResumeError(_another_number("Shards are", then, now))
    if then[0] == ranks:
        return Position(**json.loads(_position_file(checkpoint, rank).read_text())["position"])
    if stage.packing:
        raise ResumeError(_another_number("Packed rows are", then, now))
    # A chunk is a batch, and every process has used as many.
    used = saved["position"]["chunk"] * then[0]
    if used % ranks:
        raise ResumeError(f"{used} batches were used, which {ranks} processes do not divide: start {then[0]} again.")
    return Position(used // ranks, report=_total_report(checkpoint, then[0]).to_dict() if rank == 0 else None)


def _total_report(checkpoint: Path, ranks: int) -> DataReport:
    total = DataReport()
    for rank in range(ranks):
        total.merge(
            DataReport.from_dict(json.loads(_position_file(checkpoint, rank).read_text())["position"]["report"])
        )
    return total


def _another_number(what: str, then: tuple[int, int], now: tuple[int, int]) -> str:
    return (
        f"the run had {then[0]} process(es) with {then[1]} worker(s) each, now there are {now[0]} with {now[1]}. "
        f"{what} dealt out to them, so going on would repeat some samples and miss others: start as many as before."
    )


def _position_file(checkpoint: Path, rank: int) -> Path:
    return checkpoint / f"data-{rank}.json"
