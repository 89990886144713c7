"""Which backend computes a batch, and why."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache

import torch

from aki.attention.kernels import CPU_FLASH
from aki.attention.rectangles import Part, squares_and_rectangles
from aki.attention.rules import Rule

BACKENDS = ("merged", "flex", "auto")
"""Names for `attn_implementation`, beside transformers' own `sdpa` and `eager`, which take a dense mask."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """
    Attributes:
        backend: `merged`, `flex` or `dense`.
    """

    backend: str
    reason: str

    def __str__(self) -> str:
        return f"{self.backend} attention: {self.reason}"


@cache
def announce(choice: Choice) -> None:
    """Log a choice, the first time it is made, at level INFO of the logger `aki.attention.choice`."""
    logger.info("%s", choice)


def choose(
    requested: str,
    rule: Rule,
    shape: tuple[int, int],
    parts: list[Part] | None,
    *,
    device: torch.device,
    dtype: torch.dtype,
    heads: int,
) -> Choice:
    """The backend for a batch without cached tokens.

    On the CPU `auto` compares costs that were fitted to measurements (`benchmarks/attention.py`). On CUDA it goes by a
    length that is a guess: nobody has measured it yet.

    Args:
        requested: `merged`, `flex` or `auto`.
        shape: (batch, length).
        parts: the calls that merged attention would make; None where the rule is not causal plus rectangles.
    """
    if requested == "flex":
        return Choice("flex", "it was asked for")
    if parts is None:
        if device.type == "cuda":
            return Choice("flex", f"the rule {rule.name!r} is not causal plus rectangles, and CUDA has FlexAttention")
        return Choice("dense", f"the rule {rule.name!r} is not causal plus rectangles")
    if requested == "merged":
        return Choice("merged", "it was asked for")
    if len(parts) == 1 and parts[0] == (0, shape[0], 0, shape[1], 0, shape[1], 1):
        return Choice("dense", "the batch is plainly causal, which needs no mask")
    if device.type == "cuda":
        if shape[1] >= _CUDA_LENGTH:
            return Choice("merged", f"the batch is {_CUDA_LENGTH} tokens long or longer")
        return Choice("dense", f"the batch is shorter than {_CUDA_LENGTH} tokens")
    merged, dense = merged_cost(parts, heads, dtype), dense_cost(shape, heads)
    times = f"{merged / dense:.2f} times the dense mask's time"
    compared = f"merged is expected to take {times} for {shape[0]} x {shape[1]} tokens"
    return Choice("merged" if merged < _MARGIN * dense else "dense", compared)


_CUDA_LENGTH = 1024
"""A guess, not a measurement: the length from which merged should win on CUDA. It waits for a GPU run."""

_MARGIN = 0.97
"""Expectations are rough; where they are close, the dense path is the one with fewer surprises."""

_CALL = 15_000
"""What a call costs on a CPU beside its pairs, in pairs of one head (two threads, heads of 64): 0.1 to 0.2 ms."""

_EXTRA_KEYS = {torch.bfloat16: 128, torch.float16: 128}
"""What a query of a rectangle costs beside its keys, in keys: half precision is converted tile by tile."""


def merged_cost(parts: list[Part], heads: int, dtype: torch.dtype) -> float:
    """Expected time of merged attention on a CPU, in pairs of one head of a dense mask."""
    tile = CPU_FLASH.masked_length
    squares, rectangles = squares_and_rectangles(parts, tile)
    total = 0.0
    for square, _ in squares:
        length = square.stop_query - square.first_query
        # Whole tiles ahead of the diagonal are skipped.
        pairs = length * length - max(0, length - tile) * length / 2
        total += (square.stop_row - square.first_row) * heads * pairs + _CALL
    for part in rectangles:
        keys = part.stop_key - part.first_key + _EXTRA_KEYS.get(dtype, 0)
        total += (part.stop_row - part.first_row) * heads * (part.stop_query - part.first_query) * keys + _CALL
    return total


def dense_cost(shape: tuple[int, int], heads: int) -> float:
    """Expected time of a dense mask on a CPU: every pair, allowed or not."""
    batch, length = shape
    return float(batch * heads * length * length)
