"""JSON lines of messages, in the form that Hugging Face's chat templates take."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any, ClassVar

from aki.data.augment import View
from aki.data.plain import plain_messages
from aki.data.report import BadSample
from aki.data.sources.base import Source, said
from aki.data.sources.files import Columns, Row, as_list, json_lines


class Messages(Source):
    """`{"id": ..., "messages": [{"role": ..., "content": ...}, ...], "images": [...]}` a line.

    Content is a text or a list of parts. An image part names its picture (`image`, `path`, `url` or `image_url`), or
    takes the next one of `images`; so does each `<image>` in a text, where a line has `images` (the form of
    LLaMA-Factory and ms-swift). A video part has a list of frames or a file in `video`, an audio part a file in
    `audio`; scopes and tables are those of `aki.prompts.scopes`. The id may be left out. `answers` lists all that
    people gave to the last turn, by which a metric may score.
    """

    COLUMNS: ClassVar[Columns] = {"messages": "string", "answers": ["string"]}
    VERSION: ClassVar[int] = 2

    def entries(self, *files: Path) -> Iterator[tuple[str, Row] | BadSample]:
        for file in files:
            for number, value in json_lines(file):
                where = f"{file.name}:{number}"
                if isinstance(value, BadSample):
                    yield BadSample(value.reason, value.detail, id=where)
                else:
                    yield where, value

    def parse(self, entry: tuple[str, Row]) -> Iterator[Row]:
        where, values = entry
        messages = plain_messages(values["messages"], values.get("images") or [])
        yield {
            "id": str(values.get("id", where)),
            "messages": json.dumps(messages, ensure_ascii=False),
            "answers": [said(one, "answer") for one in as_list(values.get("answers") or [])],
        }

    def chat(self, row: Row, rng: Random, view: View | None) -> list[dict[str, Any]]:
        return json.loads(row["messages"])
