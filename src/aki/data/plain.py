"""Chats as people write them, dicts of messages and pictures, as samples."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image

from aki.data.report import BadSample, Reason
from aki.data.schema import Sample
from aki.prompts.scopes import write_scopes

_MARK = "<image>"
ROLES = ("system", "user", "assistant")

Message = dict[str, Any]


def as_sample(chat: Sample | Mapping[str, Any]) -> Sample:
    """A sample, also of `{"messages": [{"role": ..., "content": ...}, ...], "images": [...], "id": ...}`.

    Args:
        chat: content, pictures and marks as `plain_messages` takes them. `images` (a list, or one picture) and `id` may
            be left out.

    Raises:
        BadSample: it is no chat; what is wrong is said.
    """
    if isinstance(chat, Sample):
        return chat
    images = chat.get("images")
    images = [] if images is None else list(images) if isinstance(images, list | tuple) else [images]
    name = str(chat.get("id", ""))
    try:
        messages = plain_messages(chat["messages"], images)
        check_texts(messages)
    except BadSample as bad:
        raise BadSample(bad.reason, f"{bad.detail} It is {str(chat)[:200]}", id=name) from bad.__cause__
    except (LookupError, TypeError, ValueError) as error:
        raise BadSample(Reason.MALFORMED, f"{type(error).__name__} {error} in {str(chat)[:200]}", id=name) from error
    return Sample(messages, "", name)


def check_texts(messages: list[dict[str, Any]]) -> None:
    """
    Raises:
        BadSample: an answer without text, a question without text or media, or no answer at the end.
    """
    if not messages or messages[-1].get("role") != "assistant":
        raise BadSample(Reason.EMPTY_TEXT, "the chat does not end with an answer.")
    for message in messages:
        text = "".join(part["text"] for part in message["content"] if part["type"] == "text")
        shows = message["role"] == "user" and any(part["type"] != "text" for part in message["content"])
        if not text.strip() and not shows:
            raise BadSample(Reason.EMPTY_TEXT, f"a message of the role {message['role']} has no text.")


def plain_messages(messages: list[Message], images: list[Any]) -> list[Message]:
    """Messages whose content is parts: `{"type": "text", "text": ...}`, `{"type": "image", "image": ...}`, and alike
    video and audio. Scopes and tables are written out (`aki.prompts.scopes`).

    Args:
        images: for image parts that name none, in order.

    Raises:
        ValueError: an unknown role or part, images that no part stands for, or more parts than images.
    """
    waiting = list(images)
    plain = []
    for message in messages:
        if message["role"] not in ROLES:
            raise ValueError(f"the role {message['role']!r} is none of {', '.join(ROLES)}")
        content = message["content"]
        parts = _marked(content, bool(images)) if isinstance(content, str) else content
        plain.append({"role": message["role"], "content": [_plain_part(part, waiting) for part in write_scopes(parts)]})
    if waiting:
        raise ValueError(f"{len(waiting)} of {len(images)} images have no image part")
    return plain


def _marked(text: str, pictures: bool) -> list[Message]:
    """The parts of a text; where there are pictures, each mark is one, and the line break behind it goes too."""
    if not pictures or _MARK not in text:
        return [{"type": "text", "text": text}]
    first, *rest = text.split(_MARK)
    parts: list[Message] = [{"type": "text", "text": first}]
    for words in rest:
        parts += [{"type": "image"}, {"type": "text", "text": words.removeprefix("\n")}]
    return [part for part in parts if part["type"] == "image" or part["text"]]


def _plain_part(part: Message, waiting: list[Any]) -> Message:
    if part["type"] == "text":
        if not isinstance(part["text"], str):
            raise TypeError(f"the text of a part is {part['text']!r}")
        return {"type": "text", "text": part["text"]}
    if part["type"] in ("video", "audio"):
        kind = part["type"]
        found = next((part[key] for key in (kind, "path") if _given(part.get(key))), None)
        if found is None:
            raise ValueError(f"the {kind} part names no {kind}: give it `{kind}` or `path`")
        return {"type": kind, kind: found}
    if part["type"] not in ("image", "image_url"):
        kinds = "text, image, video, audio, scope or table"
        raise ValueError(f"a part of the type {part['type']!r} is none of {kinds}")
    named = next((part[key] for key in ("image", "path", "url", "image_url") if _given(part.get(key))), None)
    if named is None and not waiting:
        raise ValueError("the chat shows more pictures than its images are")
    return {"type": "image", "image": _image(waiting.pop(0) if named is None else named)}


def _given(value: Any) -> bool:
    return bool(value) if isinstance(value, str | bytes | dict) else value is not None


def _image(value: Any) -> Any:
    """A picture, or its name or bytes, out of the forms that messages and the `datasets` library write them in.

    Raises:
        TypeError, KeyError: it is neither.
    """
    if isinstance(value, dict):
        value = value["url"] if "url" in value else value["bytes"] or value["path"]
    if not isinstance(value, str | bytes | Path | Image | np.ndarray):
        raise TypeError(f"an image is {value!r}")
    return value
