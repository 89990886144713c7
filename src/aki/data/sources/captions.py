"""A folder of images with captions: `cat.jpg` beside `cat.txt`, or a `metadata.jsonl` with file_name and text."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any, ClassVar

from PIL import Image

from aki.data.augment import View
from aki.data.report import BadSample, Reason
from aki.data.schema import assistant, user
from aki.data.sources.base import Source, said
from aki.data.sources.files import Columns, ImageRoots, Paths, Row, json_lines
from aki.models.images import FORMATS

METADATA = "metadata.jsonl"


class Captions(Source):
    """Pictures and what they show; no question. Captions in files of their own are read when they are asked for."""

    COLUMNS: ClassVar[Columns] = {"image": "string", "caption": "string"}

    def __init__(self, annotations: Paths, images: Paths | None = None, **options: Any):
        super().__init__(annotations, images or annotations, **options)
        self.texts = ImageRoots(annotations)

    def files(self, annotations: Paths) -> list[Path]:
        """The folders, with `metadata.jsonl` where there is one."""
        folders = ImageRoots(annotations).folders
        return [*folders, *(path for path in (folder / METADATA for folder in folders) if path.exists())]

    def entries(self, *files: Path) -> Iterator[Any]:
        for folder in (file for file in files if file.is_dir()):
            metadata = folder / METADATA
            yield from (value for _, value in json_lines(metadata)) if metadata in files else _beside(folder)

    def parse(self, entry: Row) -> Iterator[Row]:
        yield {"id": entry["file_name"], "image": entry["file_name"], "caption": entry["text"]}

    def chat(self, row: Row, rng: Random, view: View | None) -> list[dict[str, Any]]:
        caption = row["caption"]
        if caption is None:
            caption = self._read(Path(row["image"]).with_suffix(".txt"))
        return [user(row["image"]), assistant(said(caption, "caption"))]

    def _read(self, name: Path) -> str:
        try:
            return self.texts.find(str(name)).read_text(encoding="utf-8-sig")
        except BadSample as bad:
            raise BadSample(Reason.EMPTY_TEXT, f"the picture has no caption: {bad.detail}") from bad
        except (OSError, UnicodeDecodeError) as error:
            raise BadSample(Reason.MALFORMED, f"the caption {name} cannot be read: {error}") from error


def _beside(folder: Path) -> Iterator[Row | BadSample]:
    """Every picture, and every caption without one, below a folder."""
    Image.init()
    endings = {ending for ending, kind in Image.EXTENSION.items() if kind in FORMATS}
    for place, below, names in os.walk(folder):
        below.sort()
        inside = Path(place).relative_to(folder)
        pictures = sorted(name for name in names if Path(name).suffix.lower() in endings)
        for name in pictures:
            yield {"file_name": str(inside / name), "text": None}
        stems = {Path(name).stem for name in pictures}
        for name in sorted(names):
            if name.endswith(".txt") and Path(name).stem not in stems:
                yield BadSample(Reason.MISSING_IMAGE, f"{name} has no picture beside it.", id=str(inside / name))
