"""Segments on a GPU: all causal ones of a batch in one call of FlashAttention's varlen form, all full ones in a second.

That form takes the tokens of many sequences one behind the other, with the places where sequences begin, and aligns
its causal mask to the bottom right of each. No query is in two segments, so nothing is merged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from aki.attention.cpu import empty_result, tokens, tokens_first_like
from aki.attention.segments import Segment, length
from aki.layout import moved


@dataclass(frozen=True)
class Kernel:
    """Attention over sequences of several lengths.

    Attributes:
        forward: (query (queries, heads, width), key, value (keys, key heads, width), edges of the sequences among the
            queries and among the keys (sequences + 1,) int32, the longest of both, causal, scale) -> (output,
            log-sum-exp (heads, queries) float32).
        backward: (grad_output, query, key, value, output, log-sum-exp, and as above) -> gradients of the three.
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Call:
    """
    Attributes:
        queries, keys: (tokens,) int64, which tokens of the batch, rows one behind the other; keys may repeat. None is
            all of them in order.
        edges: what the kernel takes behind query, key and value, but for the scale.
    """

    queries: Tensor | None
    keys: Tensor | None
    edges: tuple[Tensor, Tensor, int, int, bool]


@lru_cache(maxsize=8)
def calls(found: tuple[Segment, ...], shape: tuple[int, int, int], device: torch.device) -> tuple[Call, ...]:
    """One call for the causal segments and one for the full ones; kept for the layers to come.

    Args:
        shape: (batch, queries a row, keys a row).
    """
    groups = [[segment for segment in found if segment.is_causal == is_causal] for is_causal in (True, False)]
    return tuple(_call(group, shape, device) for group in groups if group)


def _call(found: list[Segment], shape: tuple[int, int, int], device: torch.device) -> Call:
    batch, query_room, key_room = shape
    queries, keys = [s.queries for s in found], [s.keys for s in found]
    rows = [s.row for s in found]
    edges = (_edges(queries, device), _edges(keys, device), max(map(length, queries)), max(map(length, keys)))
    sides = ((queries, query_room), (keys, key_room))
    query_index, key_index = (_index(rows, spans, room, batch * room, device) for spans, room in sides)
    return Call(query_index, key_index, (*edges, found[0].is_causal))


def _edges(spans: list, device: torch.device) -> Tensor:
    return moved(torch.tensor([0, *map(length, spans)], device="cpu").cumsum(0, dtype=torch.int32), device)


def _index(rows: list[int], spans: list, room: int, total: int, device: torch.device) -> Tensor | None:
    index = torch.cat([row * room + tokens(own) for row, own in zip(rows, spans, strict=True)])
    return None if torch.equal(index, torch.arange(total, device="cpu")) else moved(index, device)


def forward(
    kernel: Kernel, query: Tensor, key: Tensor, value: Tensor, found: tuple[Segment, ...], scale: float
) -> tuple[Tensor, Tensor]:
    """Output as the query, and log-sum-exp (batch, heads, queries); zero for queries in no segment."""
    out, lse = empty_result(query)
    flat_out, flat_lse = _flat(out.zero_()), _flat(lse.zero_())
    flat_query, flat_key, flat_value = (_flat(x) for x in (query, key, value))
    for call in calls(found, _shape(query, key), query.device):
        part_lse = write(kernel, flat_query, flat_key, flat_value, call, scale, flat_out)
        _put(flat_lse, call.queries, part_lse.transpose(0, 1).to(lse.dtype))
    return out, lse


def write(kernel: Kernel, query: Tensor, key: Tensor, value: Tensor, call: Call, scale: float, out: Tensor) -> Tensor:
    """One call. Its queries of `out`, (tokens, heads, width) as `query`, are overwritten, the others stay.

    Returns:
        log-sum-exp (heads, queries of the call).
    """
    seen = (_take(x, call.keys) for x in (key, value))
    part, lse = kernel.forward(_take(query, call.queries), *seen, *call.edges, scale)
    _put(out, call.queries, part)
    return lse


def backward(
    kernel: Kernel,
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    found: tuple[Segment, ...],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    query_gradient, key_gradient, value_gradient = (tokens_first_like(x).zero_() for x in (query, key, value))
    flat_grad, flat_query, flat_key, flat_value, flat_out = (_flat(x) for x in (grad, query, key, value, out))
    flat_lse = _flat(lse)
    for call in calls(found, _shape(query, key), query.device):
        own, seen = call.queries, call.keys
        shares = kernel.backward(
            *(_take(flat_grad, own), _take(flat_query, own), _take(flat_key, seen), _take(flat_value, seen)),
            *(_take(flat_out, own), _take(flat_lse, own).transpose(0, 1).contiguous(), *call.edges, scale),
        )
        _put(_flat(query_gradient), own, shares[0])
        for gradient, share in ((key_gradient, shares[1]), (value_gradient, shares[2])):
            _flat(gradient).add_(share) if seen is None else _flat(gradient).index_add_(0, seen, share)
    return query_gradient, key_gradient, value_gradient


def _shape(query: Tensor, key: Tensor) -> tuple[int, int, int]:
    return query.shape[0], query.shape[2], key.shape[2]


def _flat(x: Tensor) -> Tensor:
    """(batch, heads, tokens, ...) to (batch * tokens, heads, ...); a view where tokens come first in memory."""
    return x.transpose(1, 2).flatten(0, 1)


def _take(x: Tensor, index: Tensor | None) -> Tensor:
    return x if index is None else x[index]


def _put(x: Tensor, index: Tensor | None, values: Tensor) -> None:
    x.copy_(values) if index is None else x.index_copy_(0, index, values)


def _flash_forward(query, key, value, query_edges, key_edges, longest_query, longest_key, is_causal, scale):
    """As torch.nn.attention.varlen calls the operator; FlashAttention 3 and 4 take its place where torch is told so."""
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        query, key, value, query_edges, key_edges, longest_query, longest_key, 0.0, is_causal, False, scale=scale
    )
    return out, lse


def _flash_backward(
    grad, query, key, value, out, lse, query_edges, key_edges, longest_query, longest_key, is_causal, scale
):
    # Only dropout reads the random state.
    state = torch.zeros(2, dtype=torch.uint64, device=query.device)
    unused = torch.empty(0, device=query.device)
    return torch.ops.aten._flash_attention_backward(
        *(grad, query, key, value, out, lse, query_edges, key_edges, longest_query, longest_key),
        *(0.0, is_causal, state, unused),
        scale=scale,
    )


FLASH = Kernel(_flash_forward, _flash_backward)
