"""Sources of samples, by kind. What each reads is in its own file."""

from __future__ import annotations

import inspect
from difflib import get_close_matches
from typing import Any

from aki.data.sources.base import Source
from aki.data.sources.captions import Captions
from aki.data.sources.choices import AOKVQA, ScienceQA
from aki.data.sources.columns import DatasetColumns
from aki.data.sources.files import Paths, SourceError
from aki.data.sources.gqa import GQA
from aki.data.sources.llava import LlavaConversations, LlavaInstruct, LlavaPairs
from aki.data.sources.messages import Messages
from aki.data.sources.ocrvqa import OCRVQA
from aki.data.sources.regions import RefCOCO, RefCOCOg, RefCOCOPlus, VisualGenome
from aki.data.sources.scenes import Scenes
from aki.data.sources.vqav2 import VQAv2
from aki.data.sources.vsr import VSR

SOURCES: dict[str, type[Source] | type[Scenes]] = {
    "vqav2": VQAv2,
    "gqa": GQA,
    "vsr": VSR,
    "ocrvqa": OCRVQA,
    "aokvqa": AOKVQA,
    "scienceqa": ScienceQA,
    "refcoco": RefCOCO,
    "refcoco+": RefCOCOPlus,
    "refcocog": RefCOCOg,
    "visual_genome": VisualGenome,
    "llava_instruct": LlavaInstruct,
    "llava_pairs": LlavaPairs,
    "llava_conversations": LlavaConversations,
    "messages": Messages,
    "captions": Captions,
    "datasets": DatasetColumns,
    "scenes": Scenes,
}
"""The paper's eleven (section 4), what users bring, and scenes of real things."""

__all__ = ["SOURCES", "Source", "SourceError", "open_source"]


def open_source(
    kind: str, *, annotations: Paths, images: Paths | None = None, name: str | None = None, **options: Any
) -> Source | Scenes:
    """Open a source; its annotations are parsed the first time, which for large files takes minutes.

    Args:
        kind: a key of SOURCES.
        name: the kind if absent.
        options: as `Source` takes them: seed, augment, cache; what a kind takes beyond that is in its own file.

    Raises:
        SourceError: no such kind, option, file or folder, or another format.
    """
    if kind not in SOURCES:
        near = get_close_matches(kind, SOURCES, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"There are {', '.join(SOURCES)}; yours comes with --plugin."
        raise SourceError(f"there is no source of the kind {kind!r}. {hint}")
    given = {"images": images, "name": name or kind, **options}
    try:
        inspect.signature(SOURCES[kind]).bind(annotations, **given)
    except TypeError as error:
        raise SourceError(f"the source {name or kind!r} of the kind {kind!r} has wrong options: {error}.") from error
    return SOURCES[kind](annotations, **given)
