"""Which backend computes a batch, and why."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from aki.attention.cpu import TILE, Call, calls
from aki.attention.kernels import no_kernel
from aki.attention.segments import Segment, length
from aki.layout import SequenceLayout

BACKENDS = ("segments", "auto")
"""Names for `attn_implementation`, beside transformers' own `sdpa` and `eager`, which take a dense mask."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """
    Attributes:
        backend: `segments`, `dense`, or `none` where the model's own masks do.
    """

    backend: str
    reason: str

    def __str__(self) -> str:
        name = {"none": "plain"}.get(self.backend, self.backend)
        return f"{name} attention: {self.reason}"


@cache
def announce(choice: Choice) -> None:
    """Log a choice, the first time it is made, at level INFO of the logger `aki.attention.choice`."""
    logger.info("%s", choice)


def computed_in(x: Tensor) -> torch.dtype:
    """The dtype of attention over x: autocast's, where that is on."""
    kind = x.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else x.dtype


def unfit(config: PreTrainedConfig, device: torch.device, dtype: torch.dtype, batch_length: int) -> str | None:
    """Why a language model cannot be computed by segments on a batch of this length; None where it can."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if getattr(config, "v_head_dim", width) not in (None, width):
        return "its keys and values have not one width"
    if getattr(config, "attention_dropout", 0.0):
        return "it drops out scores, which the kernels cannot: set attention_dropout to 0"
    if not any(sees_everything(config, batch_length).values()):
        return "the batch is longer than the layers' window"
    return no_kernel(device, dtype, width)


def sees_everything(config: PreTrainedConfig, batch_length: int) -> dict[str, bool]:
    """For each kind of layer, whether it sees all of a batch of this length; beyond its window it needs a mask."""
    windows = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        only = (kind for kind, window in windows.items() if getattr(config, window, None) is not None)
        kinds = [next(only, "full_attention")]
    # A window that is not set sees nothing for certain.
    sizes = {kind: getattr(config, windows[kind], None) or 0 for kind in kinds if kind in windows}
    return {kind: kind == "full_attention" or batch_length <= sizes.get(kind, 0) for kind in kinds}


def choose(requested: str, found: tuple[Segment, ...], layout: SequenceLayout, embeds: Tensor, heads: int) -> Choice:
    """The backend for a batch without cached tokens.

    On the CPU `auto` compares costs that were fitted to measurements (`benchmarks/attention.py`). On CUDA it takes
    segments wherever there is anything to open or to keep apart.

    Args:
        requested: `segments` or `auto`.
        embeds: (batch, length, width), for dtype and device.
    """
    batch, size = layout.shape
    if requested == "segments":
        return Choice("segments", "it was asked for")
    if len(found) == batch and all(s.queries == s.keys == ((0, size),) and s.is_causal for s in found):
        return Choice("none", "the batch is plainly causal, which needs no mask")
    if embeds.device.type != "cpu":
        return Choice("segments", "it costs what causal attention costs")
    ours, dense = cost(calls(found), heads, computed_in(embeds)), float(batch * heads * size * size)
    compared = (
        f"segments are expected to take {ours / dense:.2f} times the dense mask's time for {batch} x {size} tokens"
    )
    if ours < _MARGIN * dense:
        return Choice("segments", compared)
    return Choice("none" if is_causal(found) else "dense", compared)


def is_causal(found: tuple[Segment, ...]) -> bool:
    """Whether these are causal attention within documents, so that the language model's own masks will do."""
    begins: dict[tuple[int, int], int] = {}
    for segment in found:
        begin = begins.setdefault(segment[:2], segment.queries[0].start)
        if not segment.is_causal or segment.keys != ((begin, segment.queries[-1].stop),):
            return False
    return True


_MARGIN = 0.97
"""Expectations are rough; where they are close, the dense path is the one with fewer surprises."""

_CALL = 15_000
"""What a call costs on a CPU beside its pairs, in pairs of one head (two threads, heads of 64): 0.1 to 0.2 ms."""

_EXTRA_KEYS = {torch.bfloat16: 128, torch.float16: 128}
"""What a query of a rectangle costs beside its keys, in keys: half precision is converted tile by tile."""


def cost(made: tuple[Call, ...], heads: int, dtype: torch.dtype) -> float:
    """Expected time on a CPU, in pairs of one head of a dense mask."""
    total = 0.0
    for call in made:
        queries, keys = length(call.queries), length(call.keys)
        if call.shape is False:
            pairs: float = queries * (keys + _EXTRA_KEYS.get(dtype, 0))
        else:
            # Whole tiles ahead of the diagonal are skipped.
            pairs = queries * queries - max(0, queries - TILE) * queries / 2
        total += (call.rows.stop - call.rows.start) * heads * pairs + _CALL
    return total
