"""JSON lines of messages, in the form that Hugging Face's chat templates take."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any, ClassVar

from aki.data.augment import View
from aki.data.report import BadSample
from aki.data.sources.base import Source
from aki.data.sources.files import Columns, Row, json_lines

_MARK = "<image>"
ROLES = ("system", "user", "assistant")


class Messages(Source):
    """`{"id": ..., "messages": [{"role": ..., "content": ...}, ...], "images": [...]}` a line.

    Content is a text or a list of parts. An image part names its picture (`image`, `path`, `url` or `image_url`), or
    takes the next one of `images`; so does each `<image>` in a text, where a line has `images` (the form of
    LLaMA-Factory and ms-swift). The id may be left out.
    """

    COLUMNS: ClassVar[Columns] = {"messages": "string"}

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
        yield {"id": str(values.get("id", where)), "messages": json.dumps(messages, ensure_ascii=False)}

    def chat(self, row: Row, rng: Random, view: View | None) -> list[dict[str, Any]]:
        return json.loads(row["messages"])


def plain_messages(messages: list[Row], images: list[Any]) -> list[Row]:
    """Messages whose content is parts, `{"type": "text", "text": ...}` or `{"type": "image", "image": ...}`.

    Args:
        images: for image parts that name none, in order.

    Raises:
        ValueError: an unknown role or part, or images that no part stands for.
        IndexError: more parts than images.
    """
    waiting = list(images)
    plain = []
    for message in messages:
        if message["role"] not in ROLES:
            raise ValueError(f"the role {message['role']!r} is none of {', '.join(ROLES)}")
        content = message["content"]
        parts = _marked(content, bool(images)) if isinstance(content, str) else content
        plain.append({"role": message["role"], "content": [_plain_part(part, waiting) for part in parts]})
    if waiting:
        raise ValueError(f"{len(waiting)} of {len(images)} images have no image part")
    return plain


def _marked(text: str, pictures: bool) -> list[Row]:
    """The parts of a text; where there are pictures, each mark is one, and the line break behind it goes too."""
    if not pictures or _MARK not in text:
        return [{"type": "text", "text": text}]
    first, *rest = text.split(_MARK)
    parts: list[Row] = [{"type": "text", "text": first}]
    for words in rest:
        parts += [{"type": "image"}, {"type": "text", "text": words.removeprefix("\n")}]
    return [part for part in parts if part["type"] == "image" or part["text"]]


def _plain_part(part: Row, waiting: list[Any]) -> Row:
    if part["type"] == "text":
        if not isinstance(part["text"], str):
            raise TypeError(f"the text of a part is {part['text']!r}")
        return {"type": "text", "text": part["text"]}
    if part["type"] not in ("image", "image_url"):
        raise ValueError(f"a part of the type {part['type']!r} is neither text nor image")
    named = next((part[key] for key in ("image", "path", "url", "image_url") if part.get(key)), None)
    return {"type": "image", "image": _image(waiting.pop(0) if named is None else named)}


def _image(value: Any) -> str | bytes:
    """A picture's name or bytes, out of the forms that messages and the `datasets` library write them in.

    Raises:
        TypeError, KeyError: it is neither.
    """
    if isinstance(value, dict):
        value = value["url"] if "url" in value else value["bytes"] or value["path"]
    if not isinstance(value, str | bytes):
        raise TypeError(f"an image is {value!r}")
    return value
