"""A mixture of sources: which sample comes when depends on the seed and its number alone."""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Protocol, TypeVar

import numpy as np

from aki.data.report import BadSample, DataReport
from aki.data.schema import Sample

ATTEMPTS = 20
"""Bad samples in a row that are replaced before reading gives up."""

Used = TypeVar("Used")


class Samples(Protocol):
    """What a mixture draws from, as `aki.data.sources.Source`."""

    name: str

    def __len__(self) -> int: ...

    def sample(self, index: int, epoch: int) -> Sample: ...


class GaveUp(ValueError):
    """Too many bad samples in a row."""


def mixture_weights(kind: str, weights: Sequence[float], sizes: Sequence[int] | None) -> np.ndarray:
    """(sources,) float64, probabilities.

    Args:
        kind: `weights` takes those given, `proportional` the sizes, `uniform` neither.
    """
    assert kind != "proportional" or sizes is not None
    chosen = {"weights": weights, "proportional": sizes, "uniform": np.ones(len(weights))}[kind]
    share = np.asarray(chosen, dtype=np.float64)
    return share / share.sum()


class Mixture:
    """An endless sequence of samples: a source by weight, then one of its samples uniformly (paper, section 4).

    Sample number i is the same whoever asks for it, so ranks, workers and resumed runs only have to agree on numbers. A
    bad sample is replaced by the next attempt's draw, which depends on (seed, i, attempt).

    Args:
        weights: (sources,) probabilities.
    """

    place = None

    def __init__(self, sources: Sequence[Samples], weights: np.ndarray, seed: int):
        self.sources, self.seed = sources, seed
        edges = np.cumsum(weights)
        self.edges = (edges / edges[-1]).tolist()

    def draw(self, number: int, attempt: int = 0) -> tuple[int, int]:
        """Which source, and which of its samples."""
        # A hash is as good as a generator that is used twice, and a tenth of its price.
        drawn = blake2b(struct.pack("<3q", self.seed, number, attempt), digest_size=16).digest()
        first, second = struct.unpack("<2Q", drawn)
        source = bisect_right(self.edges, (first >> 11) / 2**53)
        return source, second % len(self.sources[source])

    def read(self, number: int, use: Callable[[Sample], Used], report: DataReport) -> Used:
        """Sample number i as `use` makes it.

        Raises:
            GaveUp: none of `ATTEMPTS` draws can be used.
        """
        for attempt in range(ATTEMPTS):
            source, index = self.draw(number, attempt)
            used = try_sample(lambda: self.sources[source].sample(index, epoch=number), use, report)  # noqa: B023
            if used is not None:
                return used
        raise GaveUp(f"{ATTEMPTS} samples in a row could not be used. {report.summary()}.")

    def take(
        self, chunk: int, of: tuple[int, int], size: int, use: Callable[[Sample], Used], report: DataReport
    ) -> list[Used]:
        """The samples of a rank's chunk of that number.

        Args:
            of: (rank, ranks), which take chunks in turn.
            size: samples a chunk.
        """
        rank, ranks = of
        first = (chunk * ranks + rank) * size
        return [self.read(number, use, report) for number in range(first, first + size)]

    def peek(self, size: int, use: Callable[[Sample], Used]) -> list[Used]:
        """What `use` makes of the first samples for which it isn't None.

        Raises:
            GaveUp: as `read`.
        """
        return self.take(0, (0, 1), size, use, DataReport())


def try_sample(get: Callable[[], Sample], use: Callable[[Sample], Used], report: DataReport) -> Used | None:
    """What `use` makes of a sample; None where it is bad, which is counted."""
    sample = None
    try:
        sample = get()
        return use(sample)
    except BadSample as bad:
        if sample is not None and not bad.source:
            bad = BadSample(bad.reason, bad.detail, sample.source, sample.id)
        report.skip(bad)
        return None
