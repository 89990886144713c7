"""Chat messages as people write them to chat messages as templates read them: checked, media opened, scopes marked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from aki.prompts.scopes import SCOPE_PARTS, write_scopes

SOURCES = ("url", "path", "base64")
"""Where a part of a message may have its picture or clip, beside the field that is named as its type."""

Openers = dict[str, Callable[[Any], Any]]
"""Type of a part -> what opens it."""


def prepare(conversation: Any, openers: Openers) -> Any:
    """Check a chat, or a list of them, and open what it shows, into copies of the messages.

    Raises:
        ValueError: an empty chat or question, a part without its picture or clip, or of a type that nothing opens.
    """
    if not conversation:
        raise ValueError("the chat is empty: pass at least one message.")
    if isinstance(conversation[0], (list, tuple)):
        return [prepare(chat, openers) for chat in conversation]
    return [_message(message, openers) for message in conversation]


def _message(message: dict, openers: Openers) -> dict:
    content = message.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    content = [_part(part, openers) for part in write_scopes(content or [])]
    texts = [part.get("text", "") for part in content if part.get("type") == "text" and part not in SCOPE_PARTS]
    if message.get("role") == "user" and (not content or (texts and not any(text.strip() for text in texts))):
        raise ValueError("the question is empty: a user's message needs text.")
    return {**message, "content": content}


def _part(part: dict, openers: Openers) -> dict:
    if part.get("type") == "image_url":
        url = part["image_url"]
        part = {"type": "image", "url": url["url"] if isinstance(url, dict) else url}
    kind = part.get("type")
    if kind == "text":
        return part
    if kind not in ("image", "video", "audio"):
        raise ValueError(
            f"a message has a part of type {kind!r}: there are text, image, image_url, video, audio, scope and table."
        )
    if kind not in openers:
        raise ValueError(f"the chat has {kind}, which this processor was not made for (it takes {', '.join(openers)}).")
    for key in (kind, *SOURCES):
        if part.get(key) is not None:
            source = f"data:image;base64,{part[key]}" if (kind, key) == ("image", "base64") else part[key]
            return {"type": kind, kind: openers[kind](source)}
    raise ValueError(f"the {kind} part of a message has no {kind}: give it one of `{'`, `'.join((kind, *SOURCES))}`.")


def begun(conversation: list) -> list:
    """Tell the chat template that the last answer is to be continued, which transformers doesn't."""
    if isinstance(conversation[0], list):
        return [begun(chat) for chat in conversation]
    return [*conversation[:-1], {**conversation[-1], "begun": True}]
