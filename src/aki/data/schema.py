"""One schema for every source."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Sample:
    """A chat with images.

    Attributes:
        messages: the Hugging Face form, `[{"role": ..., "content": [{"type": "image", "image": ...}, ...]}, ...]`.
        source: the name of the data set.
        id: the sample's name in it.
        skill: what answering needs, where the source knows.
        answers: all that people gave, where there are several; the chat has one of them.
    """

    messages: list[dict[str, Any]]
    source: str
    id: str
    skill: str = ""
    answers: tuple[str, ...] = ()

    @property
    def question(self) -> str:
        return text_of(self.messages[0])

    @property
    def answer(self) -> str:
        return text_of(self.messages[-1])

    @property
    def golds(self) -> tuple[str, ...]:
        """What an answer is scored against."""
        return self.answers or (self.answer,)


def user(image: Any = None, text: str = "") -> dict[str, Any]:
    """A user's message: an image, a text, or both, the image first."""
    content: list[dict[str, Any]] = []
    if image is not None:
        content.append({"type": "image", "image": image})
    if text:
        content.append({"type": "text", "text": text})
    return {"role": "user", "content": content}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def text_of(message: dict[str, Any]) -> str:
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")
