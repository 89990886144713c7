"""What was skipped and why: samples that cannot be used are counted by source and reason, and never silently."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from aki.files import write_json

MIN_DRAWN = 1000
"""The share is judged as if at least so many samples had been drawn: one bad one in ten is no verdict."""
EXAMPLES = 5
"""Examples that are kept for each source and reason."""


class Reason(StrEnum):
    """Why a sample is skipped; any other short text may be one too."""

    MISSING_IMAGE = "missing image"
    BROKEN_IMAGE = "broken image"
    ABSURD_SIZE = "absurd size"
    OUTSIDE_ROOT = "path outside the image root"
    EMPTY_TEXT = "empty text"
    ANSWER_LOST = "answer lost to truncation"
    MALFORMED = "malformed entry"


class BadSample(ValueError):
    """A sample that cannot be used.

    Attributes:
        reason: a short text that counts are kept by, one of `Reason` or another.
        detail: a sentence: what is wrong, with the file or the text.
        source, id: which sample, once that is known.
    """

    def __init__(self, reason: str, detail: str, source: str = "", id: str = ""):
        super().__init__(reason, detail, source, id)
        self.reason, self.detail, self.source, self.id = str(reason), detail, source, id

    def __str__(self) -> str:
        return f"{self.source}/{self.id}: {self.reason}: {self.detail}"


class TooManyBadSamples(ValueError):
    """More samples were skipped than the set share allows."""


@dataclass
class Tally:
    """One source's counts.

    Attributes:
        drawn: samples asked for, good or bad.
        shortened: samples whose answer lost its tail to the length limit (they are used).
        skipped: reason -> samples.
        examples: reason -> the first few, each "id: detail".
    """

    drawn: int = 0
    shortened: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def merge(self, other: Tally) -> None:
        self.drawn += other.drawn
        self.shortened += other.shortened
        self.skipped.update(other.skipped)
        for reason, examples in other.examples.items():
            known = self.examples.setdefault(reason, [])
            known += [example for example in examples if example not in known][: EXAMPLES - len(known)]


@dataclass
class DataReport:
    """Counts by source and reason.

    A worker makes one for each batch (it is small and pickles), the main process merges them: what a batch that was
    never trained on would have counted is then not counted, and a resumed run goes on from its checkpoint's counts.

    Attributes:
        max_share: of all samples, and of each source's, that may be bad before the run ends.
        sources: name -> counts.
    """

    max_share: float = 0.01
    sources: dict[str, Tally] = field(default_factory=dict)

    def used(self, source: str, shortened: bool = False) -> None:
        """Count a sample that was used; `shortened` if its answer lost its tail."""
        tally = self.sources.setdefault(source, Tally())
        tally.drawn += 1
        tally.shortened += shortened

    def skip(self, bad: BadSample) -> None:
        """Count a sample that was not."""
        examples = {bad.reason: [f"{bad.id}: {bad.detail}"]}
        self.sources.setdefault(bad.source, Tally()).merge(Tally(1, 0, Counter({bad.reason: 1}), examples))

    def merge(self, other: DataReport) -> None:
        for name, tally in other.sources.items():
            self.sources.setdefault(name, Tally()).merge(tally)

    @property
    def drawn(self) -> int:
        return sum(tally.drawn for tally in self.sources.values())

    @property
    def skipped(self) -> int:
        return sum(tally.skipped.total() for tally in self.sources.values())

    def check(self, *, complete: bool = False) -> None:
        """Refuse to go on when too much is bad.

        Args:
            complete: everything has been read: the share is exact, instead of one of at least `MIN_DRAWN` samples.

        Raises:
            TooManyBadSamples: with the worst source and reason and examples of it.
        """
        shares = {"all sources": (self.skipped, self.drawn)}
        shares |= {name: (tally.skipped.total(), tally.drawn) for name, tally in self.sources.items()}
        for where, (skipped, drawn) in shares.items():
            if skipped > self.max_share * (drawn if complete else max(drawn, MIN_DRAWN)):
                raise TooManyBadSamples(
                    f"{skipped} of {drawn} samples of {where} could not be used, more than the share of "
                    f"{self.max_share:.2%} that max_bad_share allows. {self._worst(where)} "
                    "Repair or remove them, or raise max_bad_share."
                )

    def _worst(self, where: str) -> str:
        """The commonest reason, among all sources or one's, with its examples."""
        names = [where] if where in self.sources else list(self.sources)
        counts = {(name, reason): n for name in names for reason, n in self.sources[name].skipped.items()}
        name, reason = max(counts, key=lambda key: counts[key])
        examples = "; ".join(f"{name}/{example}" for example in self.sources[name].examples[reason][:3])
        return f"Most are {reason!r} in {name} ({counts[name, reason]}), for instance {examples.rstrip('.')}."

    def summary(self) -> str:
        """One line: how many of how many, by source and reason."""
        parts = [
            f"{name} {reason} {count}"
            for name, tally in self.sources.items()
            for reason, count in tally.skipped.items()
        ]
        return f"{self.skipped} of {self.drawn} samples skipped" + (f": {', '.join(parts)}" if parts else "")

    def to_dict(self) -> dict[str, Any]:
        return {
            "drawn": self.drawn,
            "skipped": self.skipped,
            "max_share": self.max_share,
            "sources": {
                name: {
                    "drawn": tally.drawn,
                    "shortened": tally.shortened,
                    "skipped": dict(tally.skipped),
                    "examples": tally.examples,
                }
                for name, tally in sorted(self.sources.items())
            },
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DataReport:
        sources = {
            name: Tally(tally["drawn"], tally["shortened"], Counter(tally["skipped"]), tally["examples"])
            for name, tally in values["sources"].items()
        }
        return cls(values["max_share"], sources)

    def write(self, path: Path) -> None:
        """Write all of `data_report.json` or nothing of it."""
        write_json(path, self.to_dict())
