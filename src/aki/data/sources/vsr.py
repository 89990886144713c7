"""VSR: captions about where things are, true or not, asked as yes/no questions. Images: COCO, train2017 and val2017."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any, ClassVar
from urllib.parse import urlsplit

from aki.data.augment import View
from aki.data.report import BadSample, Reason
from aki.data.schema import assistant, user
from aki.data.sources.base import Source, said
from aki.data.sources.files import Columns, Row, json_lines
from aki.data.sources.questions import yes_no_question
from aki.data.templates import yes_or_no

FOLDERS = ("train2017", "val2017")


class VSR(Source):
    FILES = ("train-random.jsonl",)
    COLUMNS: ClassVar[Columns] = {"image": "string", "caption": "string", "label": "int64"}

    def entries(self, *files: Path) -> Iterator[tuple[int, Row | BadSample]]:
        return json_lines(files[0])

    def parse(self, entry: tuple[int, Row | BadSample]) -> Iterator[Row]:
        line, values = entry
        if isinstance(values, BadSample):
            raise values
        folder, name = urlsplit(values["image_link"]).path.split("/")[-2:]
        if folder not in FOLDERS or values["label"] not in (0, 1):
            raise ValueError(f"image_link should be in {' or '.join(FOLDERS)}, and label 0 or 1")
        yield {"id": str(line), "image": f"{folder}/{name}", "caption": values["caption"], "label": values["label"]}

    def chat(self, row: Row, rng: Random, view: View | None) -> list[dict[str, Any]]:
        caption = said(row["caption"], "caption")
        if not any(map(str.isalnum, caption)):
            raise BadSample(Reason.EMPTY_TEXT, f"the caption {caption!r} has no words.")
        question, opposite = yes_no_question(caption)
        return [user(row["image"], yes_or_no(question)), assistant("yes" if bool(row["label"]) != opposite else "no")]
