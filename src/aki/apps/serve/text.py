"""An answer's text as its tokens come."""

from __future__ import annotations

from typing import Any

from tokenizers.decoders import DecodeStream


class AnswerText:
    """Pieces of text that, joined, are the decoded answer: no blanks before it, cut before the first stop string."""

    def __init__(self, tokenizer: Any, stops: list[str]):
        self._tokenizer, self._stops = tokenizer, StopStrings(stops)
        self._stream = DecodeStream(skip_special_tokens=True)
        self._tokens: list[int] = []
        self._decoded, self._begun = "", False

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come."""
        return self._stops.found

    def push(self, token: int) -> str:
        """The text that is certain with this token."""
        self._tokens.append(token)
        piece = self._stream.step(self._tokenizer.backend_tokenizer, token) or ""
        self._decoded += piece
        return self._stops.push(self._without_blanks(piece))

    def end(self) -> str:
        """What was held back: the beginning of a stop string, half a character."""
        whole = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
        rest = whole[len(self._decoded) :] if whole.startswith(self._decoded) else ""
        return self._stops.push(self._without_blanks(rest)) + self._stops.end()

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
