"""One request while the model works on it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from aki.apps.serve.text import AnswerText

logger = logging.getLogger(__name__)

Event = str | BaseException | None
"""A piece of the answer, what went wrong, or the end."""


@dataclass(eq=False)
class Job:
    """One request and its answer so far. The thread of the model writes it, the one of the server reads it.

    Attributes:
        inputs: of the model, a batch of one.
        max_tokens: of the answer.
        finish: why the answer ended: stop, length, cancelled, failed; None while it goes on.
        cancelled: set when nobody waits for the answer any more.
        tokens: generated so far, with the one that ends the answer.
    """

    inputs: dict[str, Tensor]
    max_tokens: int
    text: AnswerText
    end_tokens: frozenset[int]
    sampler: Sampler | None = None
    cancelled: bool = False
    tokens: int = 0
    finish: str | None = None
    arrived: float = field(default_factory=time.monotonic)
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)

    @property
    def prompt_tokens(self) -> int:
        return self.inputs["input_ids"].shape[1]

    @cached_property
    def sizes(self) -> frozenset:
        """Names and sizes of the inputs, without the prompt's length: what must be equal within a batch."""
        length = self.inputs["input_ids"].shape
        return frozenset((name, None if t.shape == length else t.shape[1:]) for name, t in self.inputs.items())

    @property
    def pictures(self) -> bool:
        """Whether the prompt has any."""
        return any(size is not None for _, size in self.sizes)

    def take(self, token: int) -> list[Event]:
        """What the client gets to see of the next token."""
        if self.cancelled:
            self.finish = "cancelled"
            return [None]
        self.tokens += 1
        ends = token in self.end_tokens
        piece = "" if ends else self.text.push(token)
        if ends or self.text.stopped:
            self.finish = "stop"
        elif self.tokens >= self.max_tokens:
            self.finish = "length"
        if self.finish is None:
            return [piece] if piece else []
        piece += self.text.end()
        return [piece, None] if piece else [None]

    def fail(self, error: Exception) -> Event:
        """End the answer with a fault that is this request's own."""
        logger.error("a request failed", exc_info=error)
        self.finish = "failed"
        return error

    async def pieces(self) -> AsyncIterator[str]:
        """The answer as it comes; pieces that are there already, because the server is busy, come as one.

        Raises:
            Exception: whatever the model raised.
        """
        while True:
            events = [await self.events.get()]
            while not self.events.empty():
                events.append(self.events.get_nowait())
            if text := "".join(event for event in events if isinstance(event, str)):
                yield text
            if isinstance(events[-1], BaseException):
                raise events[-1]
            if events[-1] is None:
                return


class Sampler:
    """Draws tokens from a generator of its own, so that a seed means the same alone and beside other requests.

    Args:
        temperature: above 0.
        top_p: the probability that the most likely tokens, which are drawn from, have together.
        seed: None for another answer each time.
    """

    def __init__(self, temperature: float, top_p: float | None, seed: int | None):
        self._warpers = [TemperatureLogitsWarper(float(temperature))]
        self._warpers += [TopPLogitsWarper(float(top_p))] if top_p is not None and top_p < 1 else []
        self._generator = torch.Generator()
        self._generator.seed() if seed is None else self._generator.manual_seed(seed)

    def draw(self, ids: Tensor, scores: Tensor) -> int:
        """A token, from scores of shape (vocabulary,) and the ids before it, (length,)."""
        # Divided by a temperature near 0, scores above 0 would be infinite.
        row = (scores - scores.max()).double()[None]
        for warp in self._warpers:
            row = warp(ids[None], row)
        return int(torch.multinomial(row.softmax(-1).cpu(), 1, generator=self._generator))
