"""Reading everything once: what can be used, what is skipped and why, how long samples are."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from aki.data.collate import ChatCollator
from aki.data.mixture import try_sample
from aki.data.report import BadSample, DataReport
from aki.data.schema import Sample
from aki.data.shards import ShardReader, ShardSet

CHUNK = 64
"""Samples that a worker reports at once."""


class Indexed(Protocol):
    """`aki.data.sources.Source` and DigitScenes."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


class Part(NamedTuple):
    """What a worker read.

    Attributes:
        report: counts of it.
        lengths: tokens -> samples.
    """

    report: DataReport
    lengths: Counter[int]
    images: int


@dataclass
class Once(IterableDataset):
    """Every sample of a source once (or of one with `limit`, so many of them, evenly spread), in parts.

    Attributes:
        source: of samples by their number, or shards.
        limit: 0 is all. Of shards, the first.
    """

    source: Indexed | ShardSet
    collator: ChatCollator
    limit: int = 0

    def __iter__(self) -> Iterator[Part]:
        worker = get_worker_info()
        part, parts = (worker.id, worker.num_workers) if worker else (0, 1)
        samples = list[Callable[[], Sample]]()
        for get in self._samples(part, parts):
            samples.append(get)
            if len(samples) == CHUNK:
                yield self._read(samples)
                samples = []
        if samples:
            yield self._read(samples)

    def _samples(self, part: int, parts: int) -> Iterator[Callable[[], Sample]]:
        if isinstance(self.source, ShardSet):
            most = self.limit // parts + (part < self.limit % parts) if self.limit else None
            for count, get in enumerate(_shard_samples(self.source, part, parts)):
                if count == most:
                    return
                yield get
            return
        size, source = len(self.source), self.source
        chosen = np.linspace(0, size, min(self.limit or size, size), endpoint=False).astype(int)
        for index in chosen[part::parts].tolist():
            yield partial(source.__getitem__, index)

    def _read(self, samples: Sequence[Callable[[], Sample]]) -> Part:
        made = Part(DataReport(), Counter(), 0)
        images = 0

        def use(sample: Sample) -> int:
            row, shortened = self.collator.encode(sample)
            made.report.used(sample.source, shortened)
            made.lengths[row["input_ids"].shape[1]] += 1
            return len(row["pixel_values"]) if "pixel_values" in row else 0

        for get in samples:
            images += try_sample(get, use, made.report) or 0
        return made._replace(images=images)


def _shard_samples(shards: ShardSet, part: int, parts: int) -> Iterator[Callable[[], Sample]]:
    reader = ShardReader(shards, 0, part, parts)
    if part >= len(shards.urls):
        return
    for member in reader:
        if reader.place.turn:
            return
        yield partial(_sample, shards, member)


def _sample(shards: ShardSet, member: Any) -> Sample:
    if isinstance(member, BadSample):
        raise member
    return shards.sample(member)


@dataclass
class Checked:
    """One source, read once.

    Attributes:
        lengths: tokens -> samples, as trained (after truncation, with images' placeholders).
        seconds: of reading.
    """

    name: str
    report: DataReport = field(default_factory=DataReport)
    lengths: Counter[int] = field(default_factory=Counter)
    images: int = 0
    seconds: float = 0.0

    def length(self, share: float) -> int:
        """The tokens that at most so large a share of the samples stays below; 0 without samples."""
        if not self.lengths:
            return 0
        lengths = sorted(self.lengths)
        below = np.cumsum([self.lengths[length] for length in lengths])
        return lengths[int(np.searchsorted(below, share * below[-1]))]

    @property
    def row(self) -> list[str]:
        """Of the table, as HEADS names it."""
        skipped = Counter[str]()
        for tally in self.report.sources.values():
            skipped.update(tally.skipped)
        why = ", ".join(f"{reason} {count}" for reason, count in skipped.most_common()) or "-"
        shortened = sum(tally.shortened for tally in self.report.sources.values())
        lengths = [str(self.length(share)) for share in (0, 0.5, 0.95, 1)]
        rate = f"{self.images / self.seconds:.0f}" if self.seconds else "-"
        return [self.name, str(self.report.drawn), str(self.report.skipped), why, str(shortened), *lengths, rate]


HEADS = ["source", "samples", "skipped", "why", "shortened", "min", "median", "95 %", "max", "images/s"]


def check_source(
    name: str, source: Indexed | ShardSet, collator: ChatCollator, workers: int = 0, limit: int = 0
) -> Checked:
    """Read a source once, as training would.

    Args:
        workers: processes that read.
        limit: samples, evenly spread; 0 is all.
    """
    checked, started = Checked(name), time.perf_counter()
    # torch's own conversion of what workers send adds a Counter to itself.
    for part in DataLoader(Once(source, collator, limit), None, num_workers=workers, collate_fn=_as_it_is):
        checked.report.merge(part.report)
        checked.lengths.update(part.lengths)
        checked.images += part.images
    checked.seconds = time.perf_counter() - started
    return checked


def _as_it_is(part: Any) -> Any:
    return part


def table(all_checked: Sequence[Checked]) -> str:
    """The sources as a Markdown table, and a line for all where there are several."""
    rows = [checked.row for checked in all_checked]
    if len(rows) > 1:
        rows.append(total(all_checked).row)
    widths = [max(len(row[column]) for row in [HEADS, *rows]) for column in range(len(HEADS))]
    aligned = [
        " | ".join(
            cell.ljust(width) if head in ("source", "why") else cell.rjust(width)
            for head, cell, width in zip(HEADS, row, widths, strict=True)
        )
        for row in [HEADS, *rows]
    ]
    rule = " | ".join(
        "-" * width if head in ("source", "why") else "-" * (width - 1) + ":"
        for head, width in zip(HEADS, widths, strict=True)
    )
    return "\n".join(f"| {line} |" for line in [aligned[0], rule, *aligned[1:]])


def total(all_checked: Sequence[Checked]) -> Checked:
    """All of them as one."""
    whole = Checked("all")
    for checked in all_checked:
        whole.report.merge(checked.report)
        whole.lengths.update(checked.lengths)
        whole.images += checked.images
        whole.seconds += checked.seconds
    return whole
