"""Merged attention over many documents in a few calls: one for all squares, one for all rectangles.

Kernels for sequences of several lengths take tokens one behind the other, with the places where sequences begin. A call
a document, as `aki.attention.merged` makes elsewhere, would leave a GPU waiting on packed rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from aki.attention.kernels import Gradients, Varlen
from aki.attention.rectangles import Part


@dataclass(frozen=True)
class Round:
    """Parts that are computed in one call, because they have no query in common.

    Attributes:
        queries, keys: (tokens,) int64, which tokens of the batch, rows one behind the other; keys may repeat.
        query_edges, key_edges: (parts + 1,) int32, where each part begins in those.
        longest_query, longest_key: tokens of the longest part.
    """

    queries: Tensor
    keys: Tensor
    query_edges: Tensor
    key_edges: Tensor
    longest_query: int
    longest_key: int
    is_causal: bool


@lru_cache(maxsize=8)
def make_rounds(parts: tuple[Part, ...], queries: int, keys: int, device: torch.device) -> tuple[Round, ...]:
    """The squares, then the rectangles; kept for the layers to come, which compute the same batch.

    Args:
        queries, keys: tokens of a row.
    """
    by_row = [part._replace(first_row=row, stop_row=row + 1) for part in parts for row in range(*part[:2])]
    groups = [[part for part in by_row if part.is_causal]]
    for part in by_row:
        if not part.is_causal:
            place = next((group for group in groups[1:] if not any(_share_queries(part, other) for other in group)), [])
            if not place:
                groups.append(place)
            place.append(part)
    return tuple(_round(group, queries, keys, device) for group in groups)


def _share_queries(one: Part, other: Part) -> bool:
    together = one.first_query < other.stop_query and other.first_query < one.stop_query
    return one.first_row == other.first_row and together


def _round(parts: Sequence[Part], queries: int, keys: int, device: torch.device) -> Round:
    query_spans = [(part.first_row * queries + part.first_query, part.stop_query - part.first_query) for part in parts]
    key_spans = [(part.first_row * keys + part.first_key, part.stop_key - part.first_key) for part in parts]
    (query_index, query_edges), (key_index, key_edges) = (_index(s, device) for s in (query_spans, key_spans))
    longest_query, longest_key = (max(length for _, length in spans) for spans in (query_spans, key_spans))
    is_causal = bool(parts[0].is_causal)
    return Round(query_index, key_index, query_edges, key_edges, longest_query, longest_key, is_causal)


def _index(spans: list[tuple[int, int]], device: torch.device) -> tuple[Tensor, Tensor]:
    tokens = torch.cat([torch.arange(start, start + length) for start, length in spans])
    edges = torch.tensor([0, *(length for _, length in spans)]).cumsum(0, dtype=torch.int32)
    return tokens.to(device), edges.to(device)


def forward(
    kernel: Varlen, query: Tensor, key: Tensor, value: Tensor, parts: Sequence[Part], scale: float
) -> tuple[Tensor, Tensor]:
    """Output (batch, heads, queries, width) and log-sum-exp (batch, heads, queries), merged in float32."""
    batch, heads, length, width = query.shape
    flat_query, flat_key, flat_value = (_flat(x) for x in (query, key, value))
    out = torch.zeros(batch * length, heads, width, dtype=torch.float32, device=query.device)
    lse = torch.full((batch * length, heads), -torch.inf, dtype=torch.float32, device=query.device)
    for one in make_rounds(tuple(parts), length, key.shape[2], query.device):
        more, more_lse = kernel.forward(
            flat_query[one.queries], flat_key[one.keys], flat_value[one.keys], one.query_edges, one.key_edges,
            one.longest_query, one.longest_key, one.is_causal, scale,
        )  # fmt: skip
        more_lse = more_lse.transpose(0, 1)
        held = lse[one.queries]
        out[one.queries] = out[one.queries].lerp(more.float(), torch.sigmoid(more_lse - held)[..., None])
        lse[one.queries] = torch.logaddexp(held, more_lse)
    return _unflat(out.to(query.dtype), batch), lse.unflatten(0, (batch, -1)).transpose(1, 2)


def backward(
    kernel: Varlen,
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    parts: Sequence[Part],
    scale: float,
) -> Gradients:
    """Gradients of the three, in the shapes of the three."""
    batch, length, keys = query.shape[0], query.shape[2], key.shape[2]
    flat_grad, flat_query, flat_key, flat_value, flat_out = (_flat(x) for x in (grad, query, key, value, out))
    flat_lse = lse.transpose(1, 2).flatten(0, 1)
    gradients = [torch.zeros_like(x) for x in (flat_query, flat_key, flat_value)]
    for one in make_rounds(tuple(parts), length, keys, query.device):
        shares = kernel.backward(
            flat_grad[one.queries], flat_query[one.queries], flat_key[one.keys], flat_value[one.keys],
            flat_out[one.queries], flat_lse[one.queries].transpose(0, 1).contiguous(), one.query_edges, one.key_edges,
            one.longest_query, one.longest_key, one.is_causal, scale,
        )  # fmt: skip
        for gradient, index, share in zip(gradients, (one.queries, one.keys, one.keys), shares, strict=True):
            gradient.index_add_(0, index, share)
    query_gradient, key_gradient, value_gradient = (_unflat(gradient, batch) for gradient in gradients)
    return query_gradient, key_gradient, value_gradient


def _flat(x: Tensor) -> Tensor:
    """(batch, heads, tokens, width) to (batch * tokens, heads, width)."""
    return x.transpose(1, 2).flatten(0, 1)


def _unflat(x: Tensor, batch: int) -> Tensor:
    return x.unflatten(0, (batch, -1)).transpose(1, 2)
