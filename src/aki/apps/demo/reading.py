"""What the page shows of one question: an answer for each rule, and for each word a picture of what looked where."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Lock
from typing import Any

import numpy as np
from PIL import Image

from aki.apps.streaming import Answer
from aki.models.explain import Explanation, explain
from aki.models.images import ImageError, open_image
from aki.models.rule import rule_of
from aki.plots import Part, overlay, word_map

SHOWN_SIDE = 1024
"""Pixels of the longer side of a picture that is kept for drawing."""


class Reader:
    """One model that answers one question at a time.

    Attributes:
        rules: causal, and the model's own if that is another.
    """

    def __init__(self, model: Any, processor: Any, max_new_tokens: int):
        self.model, self.processor, self.max_new_tokens = model, processor, max_new_tokens
        self.own_rule = rule_of(model)
        self.rules = list(dict.fromkeys(["causal", self.own_rule]))
        self.lock = Lock()

    def read(self, picture: Image.Image, question: str) -> Iterator[tuple[str, list[Explanation], str]]:
        """(the answer so far, explanations, why there are none); the explanations come last, one for each rule.

        Raises:
            ValueError: an empty question, or one longer than the model's context.
        """
        if not question.strip():
            raise ValueError("Type a question first.")
        content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
        with self.lock:
            answer = Answer(self.model, self.processor, [{"role": "user", "content": content}], self.max_new_tokens)
            try:
                text = ""
                for piece in answer:
                    text += piece
                    yield text, [], ""
            finally:
                answer.stop()
            yield text, *self._explained(picture, question, answer)

    def _explained(self, picture: Image.Image, question: str, answer: Answer) -> tuple[list[Explanation], str]:
        try:
            found = [
                explain(
                    self.model,
                    self.processor,
                    picture,
                    question,
                    attention_rule=rule,
                    max_new_tokens=self.max_new_tokens,
                    answer_ids=answer.ids if rule == self.own_rule else None,
                )
                for rule in self.rules
            ]
        except ValueError as error:
            return [], str(error)
        for explanation in found:
            explanation.image.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
        return found, ""


def opened(source: Any) -> Image.Image:
    """A picture that the page was given.

    Raises:
        ImageError: it cannot be read.
    """
    if source is None:
        raise ImageError("Give a picture first: drop one on the page, or paste it.")
    try:
        return open_image(source)
    except ImageError as error:
        # The file lies in a folder of the server's, which is nobody's business.
        raise ImageError(str(error).replace(str(source), "This file")) from error


def overlays(
    explanations: list[Explanation], part: Part, word: int, layer: int | None
) -> list[tuple[Image.Image, str]]:
    """For each explanation the picture under the map of a word, with a sentence; all of them on one scale."""
    maps = [word_map(e, word, part, layer) if word < len(_words(e, part)) else None for e in explanations]
    top = max((float(heat.max()) for heat in maps if heat is not None), default=0.0)
    return [
        (overlay(e.image, np.zeros((1, 1)) if heat is None else heat, top), _caption(e, part, word, heat))
        for e, heat in zip(explanations, maps, strict=True)
    ]


def _words(explanation: Explanation, part: Part) -> list[str]:
    return explanation.question_words if part == "question" else explanation.answer_words


def _caption(explanation: Explanation, part: Part, word: int, heat: np.ndarray | None) -> str:
    rule = explanation.rule
    if heat is None:
        return f"{rule}: its answer has no such word."
    text = _words(explanation, part)[word]
    if part == "answer":
        return f"{rule}: before “{text}” was said, {heat.sum():.0%} of the attention was on the picture."
    if not heat.any():
        return f"{rule}: the picture never sees “{text}”."
    return f"{rule}: the brightest patch pays {heat.max():.0%} of its attention to “{text}”."
