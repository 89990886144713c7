"""Ask a model about pictures, once or in a chat of several turns."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aki.apps.loading import load
from aki.apps.streaming import Answer
from aki.data.schema import assistant
from aki.models.images import open_image
from aki.models.rule import rule_of, ruled, set_rule

__all__ = ["Chat", "answer", "load"]


class Chat:
    """A chat with a model; each question takes the pictures that were added before it.

    Attributes:
        messages: the turns, in the form of Hugging Face chat templates. Pictures stand under `image`, and under `name`
            where they came from.
        pending: pictures for the next question.
    """

    def __init__(self, model: Any, processor: Any, max_new_tokens: int = 128):
        self.model, self.processor, self.max_new_tokens = model, processor, max_new_tokens
        self.messages: list[dict[str, Any]] = []
        self.pending: list[dict[str, Any]] = []

    @property
    def rule(self) -> str:
        return rule_of(self.model)

    def set_rule(self, name: str) -> None:
        """Another attention rule from the next answer on.

        Raises:
            ValueError: there is none of that name.
        """
        set_rule(self.model, self.processor, name)

    def add_image(self, source: Any) -> None:
        """A picture for the next question: anything that `aki.models.images.open_image` opens.

        Raises:
            ImageError: it cannot be read.
        """
        self.pending.append({"type": "image", "image": open_image(source), "name": str(source)})

    def reset(self) -> None:
        """Forget all turns and pictures."""
        self.messages, self.pending = [], []

    def ask(self, question: str, emit: Callable[[str], None] | None = None) -> str:
        """The answer, which becomes a turn of the chat. Interrupted, what was said so far becomes it.

        Args:
            emit: called with each piece of the answer as it is generated.

        Raises:
            ValueError: an empty question, or a chat longer than the context. The chat stays as it was.
            KeyboardInterrupt: passed on once the model has stopped.
        """
        if not question.strip():
            raise ValueError("the question is empty.")
        if any("\ud800" <= character <= "\udfff" for character in question):
            raise ValueError("the question is not UTF-8 text.")
        asked = {"role": "user", "content": [*self.pending, {"type": "text", "text": question}]}
        said = Answer(self.model, self.processor, [*self.messages, asked], self.max_new_tokens)
        pieces: list[str] = []
        try:
            for piece in said:
                pieces.append(piece)
                if emit is not None:
                    emit(piece)
        except KeyboardInterrupt:
            if pieces:
                self._take_turn(asked, pieces)
            raise
        finally:
            said.stop()
        return self._take_turn(asked, pieces)

    def _take_turn(self, asked: dict[str, Any], pieces: list[str]) -> str:
        text = "".join(pieces).strip()
        self.messages += [asked, assistant(text)]
        self.pending = []
        return text

    def save(self, path: str | Path) -> None:
        """Write the turns as JSON; pictures by where they came from.

        Raises:
            OSError: the file cannot be written.
        """
        turns = [{**m, "content": [_without_pixels(part) for part in m["content"]]} for m in self.messages]
        written = {"model": self.model.name_or_path, "rule": self.rule, "messages": turns}
        Path(path).write_text(json.dumps(written, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _without_pixels(part: dict[str, Any]) -> dict[str, Any]:
    if part["type"] != "image":
        return part
    is_url = part["name"].startswith(("http://", "https://"))
    return {"type": "image", "url" if is_url else "path": part["name"]}


def answer(
    model: Any,
    processor: Any,
    question: str,
    image: Any = None,
    *,
    max_new_tokens: int = 128,
    attention_rule: str | None = None,
    emit: Callable[[str], None] | None = None,
) -> str:
    """The greedy answer to a question about a picture, or about none.

    Args:
        image: anything that `aki.models.images.open_image` opens.
        attention_rule: instead of the model's own.
        emit: called with each piece of the answer as it is generated.

    Raises:
        ValueError: an empty question, a prompt longer than the context.
        ImageError: the picture cannot be read.
    """
    chat = Chat(model, processor, max_new_tokens)
    if image is not None:
        chat.add_image(image)
    with ruled(model, processor, attention_rule):
        return chat.ask(question, emit)
