"""Captioned pictures in webdataset tars, for pre-training (paper, section 4)."""

from __future__ import annotations

import ast
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlparse

import numpy as np
from webdataset.shardlists import expand_urls

from aki.data.mixture import ATTEMPTS, GaveUp, try_sample
from aki.data.report import BadSample, DataReport, Reason
from aki.data.schema import Sample, assistant, user
from aki.data.tars import CAPTION, PICTURES, Member, members

BLOCK = 256
"""Samples of a shard that are shuffled among each other, undecoded."""
PIPES = "AKI_ALLOW_PIPES"
"""Set to 1 in the environment, shards may be what a shell command prints."""

Used = TypeVar("Used")


class ShardError(ValueError):
    """Shards that cannot be read as asked."""


def _ocr(text: str) -> Any:
    return json.loads(text)[1]["text"]


def _grounding(text: str) -> Any:
    return ast.literal_eval(text.strip())[0][0]


CAPTIONS: dict[str, Callable[[str], Any]] = {"kale": str, "ocr": _ocr, "grounding": _grounding}
"""Kind -> the caption in a sample's txt (paper, section 4): as it stands, in a JSON list, in a Python literal."""


@dataclass(frozen=True)
class ShardSet:
    """Shards of one data set.

    Attributes:
        kind: a key of CAPTIONS.
        urls: one a shard, in the order written.
    """

    name: str
    kind: str
    urls: tuple[str, ...]

    def sample(self, member: Member) -> Sample:
        """
        Raises:
            BadSample: no picture, no caption, or one that is written in another way.
        """
        key = f"{member.url.rsplit('/', 1)[-1]}/{member.key}"
        name = next((name for name in PICTURES if name in member.files), None)
        if name is None:
            raise BadSample(Reason.MISSING_IMAGE, f"it has no {', '.join(PICTURES)}.", self.name, key)
        picture, text = (self._content(member, part, key) for part in (name, CAPTION))
        try:
            # Some editors write a byte-order mark, which is no part of the text.
            caption = CAPTIONS[self.kind](text.decode("utf-8-sig"))
            str(caption).encode()  # JSON may write half of a surrogate pair, tokenizers refuse it
        except (KeyError, IndexError, TypeError, ValueError, SyntaxError, RecursionError, MemoryError) as error:
            detail = f"its txt is no {self.kind} caption: {error!r}"
            raise BadSample(Reason.MALFORMED, detail, self.name, key) from error
        if not isinstance(caption, str) or not caption.strip():
            raise BadSample(Reason.EMPTY_TEXT, "its caption is empty.", self.name, key)
        return Sample([user(picture), assistant(caption.strip())], self.name, key)

    def _content(self, member: Member, part: str, key: str) -> bytes:
        if part not in member.files:
            raise BadSample(Reason.MALFORMED, f"it has no {part}.", self.name, key)
        content = member.files[part]
        if content is None:
            detail = f"its {part} is a link and no file: write the tar with --dereference and --hard-dereference."
            raise BadSample(Reason.MALFORMED, detail, self.name, key)
        return content


def open_shards(kind: str, urls: Sequence[str], name: str = "") -> ShardSet:
    """Shards by path, brace range (`{000..099}.tar`) or URL.

    Raises:
        ShardError: no such kind, a path that is not there, or a shell command that the user has not allowed.
    """
    if kind not in CAPTIONS:
        raise ShardError(f"there are no shards of the kind {kind!r}; there are {', '.join(CAPTIONS)}.")
    found = tuple(url for pattern in urls for url in expand_urls(pattern))
    commands = [url for url in found if urlparse(url).scheme == "pipe"]
    if commands and os.environ.get(PIPES) != "1":
        raise ShardError(
            f"{commands[0]} runs a command in a shell: if you know what it does and want that, set {PIPES}=1 in the "
            "environment; otherwise name the shards by path or URL."
        )
    local = [url for url in found if urlparse(url).scheme in ("", "file")]
    absent = [url for url in local if not Path(urlparse(url).path).is_file()]
    if absent or not found:
        raise ShardError(f"there is no shard at {absent[0] if absent else urls} ({len(absent)} of {len(found)}).")
    return ShardSet(name or kind, kind, found)


@dataclass
class Place:
    """Where a reader stands in one set: of its pass, its shard, its block, the next member. JSON."""

    turn: int = 0
    shard: int = 0
    block: int = 0
    member: int = 0


@dataclass
class ShardReader:
    """Endless members of the shards of one set that fall to one worker.

    Each pass deals all shards out anew in a random order, which is the same for everybody. In a shard, members are
    shuffled a block at a time. `place` is where it goes on: what comes before in the shard is passed over undecoded.

    Attributes:
        part, parts: which of the workers of all ranks this is, and how many there are.
    """

    shards: ShardSet
    seed: int
    part: int
    parts: int
    place: Place = field(default_factory=Place)

    def __iter__(self) -> Iterator[Member | BadSample]:
        """Members, and in their place what could not be read."""
        while True:
            own = self._own(self.place.turn)
            while self.place.shard < len(own):
                yield from self._shard(own[self.place.shard])
                self.place = Place(self.place.turn, self.place.shard + 1)
            self.place = Place(self.place.turn + 1)

    def _own(self, turn: int) -> list[str]:
        order = np.random.default_rng([self.seed, turn]).permutation(len(self.shards.urls))
        return [self.shards.urls[i] for i in order[self.part :: self.parts]]

    def _shard(self, url: str) -> Iterator[Member | BadSample]:
        start, empty = self.place, True
        for number, block in enumerate(_blocks(self._members(url))):
            empty = False
            if number < start.block:
                continue
            first = start.member if number == start.block else 0
            order = np.random.default_rng([self.seed, start.turn, start.shard, number]).permutation(len(block))
            for at in range(first, len(block)):
                self.place = Place(start.turn, start.shard, number, at + 1)
                yield block[order[at]]
        if empty:
            yield BadSample(Reason.MALFORMED, "the tar holds no samples.", self.shards.name, url)

    def _members(self, url: str) -> Iterator[Member | BadSample]:
        return members(url, lambda detail: BadSample(Reason.MALFORMED, detail, self.shards.name, url))


class ShardMixture:
    """An endless sequence of samples from sets of shards: a set by weight, then its next sample.

    It is the same again on the same number of ranks and workers alone.

    Args:
        weights: (sets,) probabilities.
        workers: processes a rank that read, at least 1.
        places: where each of a rank's workers goes on.

    Raises:
        ShardError: a set has fewer shards than there are workers in all.
    """

    def __init__(
        self,
        sets: Sequence[ShardSet],
        weights: np.ndarray,
        seed: int,
        workers: int,
        ranks: int = 1,
        places: dict[str, Any] | None = None,
    ):
        for one in sets:
            if len(one.urls) < workers * ranks:
                raise ShardError(
                    f"{one.name} has {len(one.urls)} shard(s), {ranks} process(es) with {workers} worker(s) each need "
                    f"{workers * ranks}: start fewer, set workers, or make smaller shards."
                )
        self.sets, self.weights, self.seed, self.workers = sets, weights, seed, workers
        self.places = places or {}
        self.place: dict[str, Any] | None = None
        self._readers: dict[int, _Worker] = {}

    def take(
        self, chunk: int, of: tuple[int, int], size: int, use: Callable[[Sample], Used], report: DataReport
    ) -> list[Used]:
        """As `Mixture.take`, but chunks have to be asked for in order, each of a worker's `workers` after the last."""
        worker = chunk % self.workers
        if worker not in self._readers:
            rank, ranks = of
            part = (rank * self.workers + worker, ranks * self.workers)
            self._readers[worker] = _Worker(self.sets, self.weights, self.seed, part, self.places.get(str(worker)))
        reader = self._readers[worker]
        taken = [reader.read(use, report) for _ in range(size)]
        self.place = reader.place
        return taken

    def peek(self, size: int, use: Callable[[Sample], Used]) -> list[Used]:
        """As `Mixture.peek`."""
        return ShardMixture(self.sets, self.weights, self.seed, 1).take(0, (0, 1), size, use, DataReport())


class _Worker:
    """What one worker of one rank reads."""

    def __init__(
        self,
        sets: Sequence[ShardSet],
        weights: np.ndarray,
        seed: int,
        part: tuple[int, int],
        place: dict[str, Any] | None,
    ):
        place = place or {"draws": 0, "sets": [{} for _ in sets]}
        self.weights, self.seed, self.part, self.draws = weights, seed, part[0], place["draws"]
        self.readers = [
            ShardReader(one, seed * len(sets) + number, *part, Place(**place["sets"][number]))
            for number, one in enumerate(sets)
        ]
        self.members = [iter(reader) for reader in self.readers]

    @property
    def place(self) -> dict[str, Any]:
        return {"draws": self.draws, "sets": [vars(reader.place).copy() for reader in self.readers]}

    def read(self, use: Callable[[Sample], Used], report: DataReport) -> Used:
        for _ in range(ATTEMPTS):
            rng = np.random.default_rng([self.seed, self.part, self.draws])
            number = int(rng.choice(len(self.weights), p=self.weights))
            self.draws += 1
            used = try_sample(lambda: self._next(number), use, report)  # noqa: B023
            if used is not None:
                return used
        raise GaveUp(f"{ATTEMPTS} samples in a row could not be used. {report.summary()}.")

    def _next(self, number: int) -> Sample:
        member = next(self.members[number])
        if isinstance(member, BadSample):
            raise member
        return self.readers[number].shards.sample(member)


def _blocks(members: Iterator[Member | BadSample]) -> Iterator[list[Member | BadSample]]:
    block: list[Member | BadSample] = []
    for member in members:
        block.append(member)
        if len(block) == BLOCK:
            yield block
            block = []
    if block:
        yield block
