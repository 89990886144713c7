"""From endless samples to a rank's batches: the same ones whatever the number of workers, from any point on.

Workers make *chunks*: a batch of samples, or, packed, all the rows that a buffer of samples fills. The main process
cuts batches from chunks, counts bad samples, and knows where it stands: everything up to the batch that it gave out
last has been used, whatever workers have read ahead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, NamedTuple, Protocol

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from aki.data.collate import ChatCollator
from aki.data.mixture import ATTEMPTS, GaveUp
from aki.data.pack import RopeIndex, position_axes
from aki.data.packing import AXES, PackedCollator, Row, items_of, join, kinds_of, pack, split_rows, with_axes
from aki.data.report import DataReport, TooManyBadSamples
from aki.data.schema import Sample

PACKED_CHUNK = 256
"""Samples that are packed together."""


class Samples(Protocol):
    """Endless samples: `aki.data.mixture.Mixture` or `aki.data.shards.ShardMixture`.

    Attributes:
        place: where the last chunk ended (JSON), where its number does not tell.
    """

    place: Any

    def take(
        self, chunk: int, of: tuple[int, int], size: int, use: Callable[[Sample], Any], report: DataReport
    ) -> list[Any]: ...


class Chunk(NamedTuple):
    """Rows with what reading them counted.

    Attributes:
        batch: the rows as one batch; None where reading gave up.
        rows: how many.
        items: of each kind of media in the batch, how many each row has.
        place: where its worker stands after it, for samples whose place their number does not tell.
    """

    batch: Row | None
    rows: int
    items: dict[str, list[int]]
    report: DataReport
    place: Any


@dataclass
class Position:
    """Where a rank stands; JSON.

    Attributes:
        chunk: the first chunk that is not used up.
        row: the first of its rows that is not used.
        places: of readers whose place their number does not tell, one a worker.
        report: what has been counted.
    """

    chunk: int = 0
    row: int = 0
    places: dict[str, Any] = field(default_factory=dict)
    report: dict[str, Any] | None = None


@dataclass
class Feed(IterableDataset):
    """Chunks of one rank, dealt out to workers in turn.

    Attributes:
        collators: one an order; a batch has every sample once in each: all in the first, then all in the second;
            a packed row has them one behind the other.
        batch_size: rows a batch.
        row_tokens: pack rows of so many tokens; None: a row is a sample.
        rank, ranks: which process this is.
        rope_index: of a family with multimodal rotary positions, whose packed documents get their own.
        spares: rows with media of which nothing is learned, one for each kind; a batch without a kind gets its spare.
            None: batches stay as they are.
        padding_free: a batch is one row, the samples one behind the other.
    """

    samples: Samples
    collators: Sequence[ChatCollator]
    batch_size: int
    row_tokens: int | None = None
    rank: int = 0
    ranks: int = 1
    first_chunk: int = 0
    rope_index: RopeIndex | None = None
    spares: Sequence[Row] | None = None
    padding_free: bool = False

    def __iter__(self) -> Iterator[Chunk]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for chunk in count(self.first_chunk + first, step):
            yield self.chunk(chunk)

    def chunk(self, number: int) -> Chunk:
        report = DataReport()
        size = self.batch_size if self.row_tokens is None else PACKED_CHUNK

        def use(sample: Sample) -> list[Row]:
            # Opened once for all orders.
            opened = sample if len(self.collators) == 1 else self.collators[0].opened(sample)
            encoded = [collator.encode(opened) for collator in self.collators]
            report.used(sample.source, any(shortened for _, shortened in encoded))
            return [self.placed(row) for row, _ in encoded]

        try:
            taken = self.samples.take(number, (self.rank, self.ranks), size, use, report)
        except GaveUp:
            return Chunk(None, 0, {}, report, None)
        if self.row_tokens is not None:
            rows = pack(taken, self.row_tokens)
        else:
            rows = self.with_spares([row for in_order in zip(*taken, strict=True) for row in in_order])
        return Chunk(self.batch(rows), len(rows), items_of(rows), report, self.samples.place)

    def placed(self, row: Row) -> Row:
        """A sample with its positions, where they are more than its tokens' numbers."""
        if self.rope_index is None:
            return row
        return row | {AXES: position_axes(self.rope_index, row).transpose(0, 1)}

    def with_spares(self, rows: list[Row]) -> list[Row]:
        """The rows of a batch with a spare for each kind of media that they lack.

        Raises:
            ValueError: they have media of a kind without a spare.
        """
        if self.spares is None:
            return rows
        there = kinds_of(rows)
        if unknown := there - kinds_of(self.spares):
            raise ValueError(
                f"a sample has {', '.join(sorted(unknown))}, which none of the first ones had: processes that share a "
                "model in shards have to meet in it in each step. Give such samples more weight, or train without "
                "shards."
            )
        return rows + [spare for spare in self.spares if not kinds_of([spare]) <= there]

    def batch(self, rows: list[Row]) -> Row:
        if self.padding_free:
            return with_axes(join(rows))
        return PackedCollator(self.collators[0].processor.tokenizer.pad_token_id)(rows)


class Loader:
    """Batches of a feed, for a Trainer.

    Args:
        workers: processes that read; 0 reads in this one.
        position: where to begin.
        max_bad_share: of the samples that may be bad.

    Attributes:
        report: what has been counted.
    """

    def __init__(
        self,
        feed: Feed,
        workers: int,
        position: Position | None = None,
        max_bad_share: float = 0.01,
        pin_memory: bool = False,
    ):
        self.feed, self.workers, self.pin_memory = feed, workers, pin_memory
        self._at = position or Position()
        self.report = DataReport.from_dict(self._at.report) if self._at.report else DataReport()
        self.report.max_share = max_bad_share

    @property
    def position(self) -> Position:
        """After the last batch that was given out."""
        return replace(self._at, report=self.report.to_dict())

    def __iter__(self) -> Iterator[Row]:
        """
        Raises:
            TooManyBadSamples: naming the worst.
        """
        start, skipped = self._at.chunk, self._at.row
        places = dict(self._at.places)
        waiting: list[Row] = []
        for number, chunk in zip(count(start), self._chunks(), strict=False):
            first = skipped if number == start else 0
            # What a chunk counts was counted when its first row was used.
            rows = self._rows(chunk, count_it=first == 0)
            for row in range(first, len(rows)):
                waiting.append(rows[row])
                last = row + 1 == len(rows)
                if last:
                    places = places | {str(number % max(self.workers, 1)): chunk.place}
                if len(waiting) == (1 if self.feed.row_tokens is None else self.feed.batch_size):
                    self._at = Position(number + 1, 0, places) if last else Position(number, row + 1, places)
                    yield waiting[0] if self.feed.row_tokens is None else self._packed(waiting)
                    waiting = []

    def _packed(self, rows: list[Row]) -> Row:
        return with_axes(self.feed.batch(self.feed.with_spares(rows)))

    def _chunks(self) -> Iterator[Chunk]:
        feed = replace(self.feed, first_chunk=self._at.chunk)
        # It draws a seed when it begins. Drawn from torch's own, dropout would be another after resuming.
        seeds = torch.Generator()
        return iter(
            DataLoader(feed, batch_size=None, num_workers=self.workers, pin_memory=self.pin_memory, generator=seeds)
        )

    def _rows(self, chunk: Chunk, count_it: bool) -> list[Row]:
        """The rows of a chunk, or all of it as one where a chunk is a batch."""
        if count_it:
            self.report.merge(chunk.report)
            self.report.check()
        if chunk.batch is None:
            raise TooManyBadSamples(f"{ATTEMPTS} samples in a row could not be used. {chunk.report.summary()}.")
        if self.feed.row_tokens is None:
            return [chunk.batch]
        return list(split_rows(chunk.batch, chunk.rows, chunk.items))
