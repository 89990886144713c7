"""Sources of samples, by kind. What each reads is in its own file."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from aki.data.sources.base import Source
from aki.data.sources.files import Paths, SourceError
from aki.data.sources.vqav2 import VQAv2

SOURCES: dict[str, type[Source]] = {
    "vqav2": VQAv2,
}

__all__ = ["SOURCES", "Source", "SourceError", "open_source"]


def open_source(
    kind: str, *, annotations: Paths, images: Paths | None = None, name: str | None = None, **options: Any
) -> Source:
    """Open a source; its annotations are parsed the first time, which for large files takes minutes.

    Args:
        kind: a key of SOURCES.
        name: the kind if absent.
        options: as `Source` takes them: seed, augment, cache; what a kind takes beyond that is in its own file.

    Raises:
        SourceError: no such kind, files or folders, or another format.
    """
    if kind not in SOURCES:
        near = get_close_matches(kind, SOURCES, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"There are {', '.join(SOURCES)}."
        raise SourceError(f"there is no source of the kind {kind!r}. {hint}")
    return SOURCES[kind](annotations, images, name=name or kind, **options)
