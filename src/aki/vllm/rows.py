"""Rows of a step that see more than causal ones, computed again from the step's own queries, keys and values.

This knows no backend of vLLM: rotary positions are in q and k already, and causal attention does not care about the
order of its keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from aki.attention import segments
from aki.attention.kernels import no_kernel
from aki.vllm.prompts import Opening, Span


@dataclass(frozen=True)
class Rows:
    """Queries of one request that see the same keys ahead.

    Attributes:
        queries: where they stand among the step's tokens.
        tokens: where the request's tokens of this step stand.
        cached: how many tokens of the request were computed before this step.
        row: the request's place in the step's batch.
        opening: what they see.
        first: position of the first query in its request.
    """

    queries: slice
    tokens: slice
    cached: int
    row: int
    opening: Opening
    first: int

    @property
    def keys(self) -> list[Span]:
        """Spans of keys in the request, the queries' own last."""
        behind = (0, self.opening.stop if self.opening.whole else self.stop)
        return [*self.opening.ahead, behind]

    @property
    def stop(self) -> int:
        return self.first + self.queries.stop - self.queries.start

    def segment(self, cached_at: int) -> segments.Segment:
        """For a kernel that takes sequences of several lengths.

        Args:
            cached_at: where keys of earlier steps begin, if there are any, behind those of the step's tokens.
        """
        step = self.tokens.start - self.cached
        keys = list[segments.Span]()
        for first, stop in self.keys:
            for place, begin, end in ((cached_at, 0, self.cached), (step, self.cached, self.tokens.stop - step)):
                if max(first, begin) < min(stop, end):
                    keys.append(segments.Span(place + max(first, begin), place + min(stop, end)))
        queries = segments.Span(self.queries.start, self.queries.stop)
        return segments.Segment(0, 0, (queries,), tuple(keys), not self.opening.whole)

    def mask(self, window: int | None, device: torch.device) -> Tensor:
        """(queries, keys) bool. Behind itself a query sees what is within the layer's window, ahead what is opened."""
        queries = torch.arange(self.first, self.stop, device=device)[:, None]
        keys = torch.cat([torch.arange(*span, device=device) for span in self.keys])[None, :]
        behind = keys <= queries
        if window is not None:
            behind &= queries - keys < window
        ahead = keys >= self.opening.stop
        if self.opening.whole:
            ahead = ahead | ((keys > queries) & (keys >= self.opening.first))
        return behind | ahead


def takes_segments(impl: Any, window: int | None, query: Tensor, value: Tensor) -> bool:
    """Whether FlashAttention's plain form gives what a layer gives."""
    odd = window is not None or getattr(impl, "logits_soft_cap", None) or getattr(impl, "sinks", None) is not None
    fits = query.shape[-1] == value.shape[-1] and no_kernel(query.device, query.dtype, query.shape[-1]) is None
    return query.is_cuda and fits and not odd


def attend(impl: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """What an attention layer of vLLM gives for some rows.

    Args:
        impl: the layer's, for its scale, its cap on scores and its sinks.
        query: (rows, heads, width).
        key, value: (keys, key heads, width).
        mask: (rows, keys) bool.

    Returns:
        (rows, heads, width of values).
    """
    query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    cap, sinks = getattr(impl, "logits_soft_cap", None), getattr(impl, "sinks", None)
    if not cap and sinks is None:
        out = nn.functional.scaled_dot_product_attention(
            query[None], key[None], value[None], attn_mask=mask, scale=impl.scale, enable_gqa=True
        )
        return out[0].transpose(0, 1)
    groups = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0)
    scores = (query.float() @ key.float().transpose(1, 2)) * impl.scale
    if cap:
        scores = cap * torch.tanh(scores / cap)
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        sink = sinks.float().view(-1, 1, 1).expand(-1, scores.shape[1], 1)
        scores = torch.cat([scores, sink], dim=-1)
    weights = scores.softmax(-1)[..., : key.shape[1]]
    return (weights @ value.float()).to(value.dtype).transpose(0, 1)
