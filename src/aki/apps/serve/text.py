"""An answer's text as its tokens come."""

from __future__ import annotations

from typing import Any


class AnswerText:
    """Pieces of text that, joined, are the decoded answer: no blanks before it, cut before the first stop string.

    A piece is what the new tokens add to those of the piece before: decoders look at the token before, and take blanks
    from where the tokens begin. (tokenizers' DecodeStream raises on bytes that are no text.)
    """

    def __init__(self, tokenizer: Any, stops: list[str]):
        self._tokenizer, self._stops = tokenizer, StopStrings(stops)
        self._before: list[int] = []
        self._new: list[int] = []
        self._begun = False

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come."""
        return self._stops.found

    def push(self, token: int) -> str:
        """The text that is certain with this token."""
        self._new.append(token)
        piece = self._added()
        if not piece or piece.endswith("\ufffd"):  # Nothing, or half a character.
            return ""
        self._before, self._new = self._new, []
        return self._stops.push(self._without_blanks(piece))

    def end(self) -> str:
        """What was held back: the beginning of a stop string, half a character."""
        return self._stops.push(self._without_blanks(self._added())) + self._stops.end()

    def _added(self) -> str:
        return self._decoded(self._before + self._new)[len(self._decoded(self._before)) :]

    def _decoded(self, tokens: list[int]) -> str:
        return self._tokenizer.backend_tokenizer.decode(tokens, skip_special_tokens=True)

    def _without_blanks(self, piece: str) -> str:
        piece = piece if self._begun else piece.lstrip()
        self._begun = self._begun or bool(piece)
        return piece


class StopStrings:
    """Text up to the first stop string, however it is cut into pieces."""

    def __init__(self, stops: list[str]):
        self.stops, self.found = stops, False
        self._held = ""

    def push(self, piece: str) -> str:
        if self.found:
            return ""
        text = self._held + piece
        # The first to be complete; of those that end together, the longest.
        ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in self.stops if stop in text]
        if ends:
            self.found, self._held = True, ""
            return text[: min(ends)[1]]
        held = max((_overlap(text, stop) for stop in self.stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def end(self) -> str:
        held, self._held = self._held, ""
        return "" if self.found else held


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of the text may be the beginning of the stop string."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
