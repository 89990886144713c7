"""Segments on the CPU, whose fused kernel is aligned to the top left and takes one sequence at a time.

A causal segment is then a square over its own tokens, and a rectangle over what else it sees. The squares of segments
that follow each other, each of which sees all before it, are one: what mma adds to causal attention is a rectangle a
picture. The softmax over a union of disjoint key sets is a merge of the softmaxes over each. With o_i, l_i the output
and the log-sum-exp over key set i:

    l = log(exp(l_1) + exp(l_2))        o = exp(l_1 - l) o_1 + exp(l_2 - l) o_2

The gradient of a score depends on its own key and on (o, l) only, so the kernel's backward, called with the merged
(o, l), gives each part's share, and the shares add up.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from aki.attention.segments import Segment, Span, joined, length

TILE = 512
"""Keys that the kernel takes at a time: up to so many, a mask costs no more than the causal half that it saves."""

Spans = tuple[Span, ...]


class Call(NamedTuple):
    """One call of the kernel.

    Attributes:
        rows: of the batch.
        shape: True is causal, queries and keys are then the same; False is all pairs; segments say which pairs, as a
            mask.
        is_more: its queries have an output already, with which it is merged.
    """

    rows: Span
    queries: Spans
    keys: Spans
    shape: bool | tuple[Segment, ...]
    is_more: bool = False


@lru_cache(maxsize=64)
def calls(found: tuple[Segment, ...]) -> tuple[Call, ...]:
    """What computes these segments. Rows that follow each other and need the same share their calls."""
    by_row = [(row, tuple(_of_row(list(own)))) for row, own in groupby(found, key=lambda segment: segment.row)]
    made: list[Call] = []
    i = 0
    while i < len(by_row):
        stop = i + 1
        while stop < len(by_row) and by_row[stop] == (by_row[i][0] + stop - i, by_row[i][1]):
            stop += 1
        rows = Span(by_row[i][0], by_row[i][0] + stop - i)
        made += [call._replace(rows=rows) for call in by_row[i][1]]
        i = stop
    return tuple(made)


_ANY = Span(0, 0)


def _of_row(found: list[Segment]) -> list[Call]:
    """Those that write an output before those that are merged into it."""
    documents = groupby(sorted(found, key=lambda segment: segment.document), key=lambda segment: segment.document)
    made = [call for _, own in documents for call in _of_document([s._replace(row=0) for s in own])]
    return sorted(made, key=lambda call: call.is_more)


def _of_document(found: list[Segment]) -> Iterator[Call]:
    whole = joined(sorted(span for segment in found for span in segment.queries))
    seen = [span for segment in found for span in segment.keys]
    inside = min(start for start, _ in seen) >= whole[0].start and max(stop for _, stop in seen) <= whole[-1].stop
    if len(found) > 1 and len(whole) == 1 and inside and length(whole) <= TILE:
        # Calls cost more here than a mask.
        origin = whole[0].start
        yield Call(_ANY, whole, whole, tuple(_moved(segment, -origin) for segment in found))
        return
    yield from (Call(_ANY, segment.queries, segment.keys, False) for segment in found if not segment.is_causal)
    square: Span | None = None
    rest: list[tuple[Span, Spans]] = []
    for own, others in sorted(piece for segment in found if segment.is_causal for piece in _pieces(segment)):
        if square and square.stop == own.start and not _without((square,), others):
            square = Span(square.start, own.stop)
        else:
            yield from [Call(_ANY, (square,), (square,), True)] if square else []
            square = own
        others = _without(others, (Span(square.start, own.start),))
        if rest and rest[-1][0].stop == own.start and rest[-1][1] == others:
            rest[-1] = Span(rest[-1][0].start, own.stop), others
        elif others:
            rest.append((own, others))
    yield from [Call(_ANY, (square,), (square,), True)] if square else []
    yield from (Call(_ANY, (own,), others, False, True) for own, others in rest)


def _pieces(segment: Segment) -> Iterator[tuple[Span, Spans]]:
    """A causal segment's spans of queries, and what each sees besides its own past in that span; ascending."""
    others = _without(tuple(sorted(segment.keys)), segment.queries)
    for i, own in enumerate(segment.queries):
        yield own, joined(sorted((*others, *segment.queries[:i])))


def _without(spans: Spans, taken: Spans) -> Spans:
    """Ascending spans less those of `taken`."""
    for low, high in taken:
        cut = [(Span(start, min(stop, low)), Span(max(start, high), stop)) for start, stop in spans]
        spans = tuple(piece for pieces in cut for piece in pieces if piece.start < piece.stop)
    return spans


def _moved(segment: Segment, by: int) -> Segment:
    queries, keys = (
        tuple(Span(start + by, stop + by) for start, stop in spans) for spans in (segment.queries, segment.keys)
    )
    return segment._replace(document=0, queries=queries, keys=keys)


def forward(query: Tensor, key: Tensor, value: Tensor, made: Sequence[Call], scale: float) -> tuple[Tensor, Tensor]:
    """Output as the query, and log-sum-exp (batch, heads, queries); zero for queries in no call."""
    if made and _is_everything(made[0], query, key):
        out, lse = _kernel(query, key, value, made[0].shape, scale)
        out = out.transpose(1, 2).contiguous().transpose(1, 2)
        lse = lse.transpose(1, 2).contiguous().transpose(1, 2)
        made = made[1:]
    else:
        out, lse = empty_result(query)
        if sum((c.rows.stop - c.rows.start) * length(c.queries) for c in made if not c.is_more) < lse[:, 0].numel():
            out.zero_()
            lse.zero_()
    for call in made:
        own, keys = (call.rows, call.queries), (call.rows, call.keys)
        part, part_lse = _kernel(_take(query, *own), _take(key, *keys), _take(value, *keys), call.shape, scale)
        if call.is_more:
            held, held_lse = _take(out, *own), _take(lse, *own)
            part = held.to(held_lse.dtype).lerp(part.to(held_lse.dtype), torch.sigmoid(part_lse - held_lse)[..., None])
            part_lse = torch.logaddexp(held_lse, part_lse)
        _put(out, *own, part)
        _put(lse, *own, part_lse)
    return out, lse


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    made: Sequence[Call],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    if made and _is_everything(made[0], query, key):
        shares = _kernel_backward(grad, query, key, value, out, lse, made[0].shape, scale)
        gradients = [share.transpose(1, 2).contiguous().transpose(1, 2) for share in shares]
        made = made[1:]
    else:
        gradients = [tokens_first_like(x).zero_() for x in (query, key, value)]
    for call in made:
        own, keys = (call.rows, call.queries), (call.rows, call.keys)
        shares = _kernel_backward(
            *(_take(grad, *own), _take(query, *own), _take(key, *keys), _take(value, *keys)),
            *(_take(out, *own), _take(lse, *own), call.shape, scale),
        )
        for gradient, at, share in zip(gradients, (own, keys, keys), shares, strict=True):
            _put(gradient, *at, share, add=True)
    query_gradient, key_gradient, value_gradient = gradients
    return query_gradient, key_gradient, value_gradient


def empty_result(query: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, queries, _ = query.shape
    precise = torch.promote_types(query.dtype, torch.float32)
    lse = torch.empty((batch, queries, heads), dtype=precise, device=query.device).transpose(1, 2)
    return tokens_first_like(query), lse


def tokens_first_like(x: Tensor) -> Tensor:
    """Empty, in the order in memory that the kernels write: (batch, tokens, heads, ...)."""
    return torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


def _kernel(query: Tensor, key: Tensor, value: Tensor, shape: bool | tuple[Segment, ...], scale: float):
    # At float32's precision for half too, so that forward and backward share it.
    precise = torch.promote_types(query.dtype, torch.float32)
    mask = None if isinstance(shape, bool) else _mask(shape, query.shape[2], precise)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, shape is True, attn_mask=mask, scale=scale
    )


def _kernel_backward(grad, query, key, value, out, lse, shape: bool | tuple[Segment, ...], scale: float):
    dtype = query.dtype
    if key.shape[2] <= TILE:
        # In half precision so few keys cost the kernel's backward more than in float32.
        grad, query, key, value, out = (x.to(lse.dtype) for x in (grad, query, key, value, out))
    mask = None if isinstance(shape, bool) else _mask(shape, query.shape[2], lse.dtype)
    gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, query, key, value, out, lse, 0.0, shape is True, attn_mask=mask, scale=scale
    )
    return [gradient.to(dtype) for gradient in gradients]


@lru_cache(maxsize=64)
def _mask(found: tuple[Segment, ...], size: int, dtype: torch.dtype) -> Tensor:
    """(size, size), 0 where a key is seen and -inf elsewhere; kept for the layers to come, which compute the same."""
    with torch.inference_mode(False):
        mask = torch.full((size, size), -torch.inf, dtype=dtype, device="cpu")
        for segment in found:
            queries, keys = (tokens(spans) for spans in (segment.queries, segment.keys))
            seen = mask.new_zeros(len(queries), len(keys))
            if segment.is_causal:
                seen = seen.masked_fill(torch.ones_like(seen).triu(len(keys) - len(queries) + 1).bool(), -torch.inf)
            mask[queries[:, None], keys] = seen
    return mask


def tokens(spans: Iterable[Span]) -> Tensor:
    """(tokens,) int64, on the CPU."""
    return torch.cat([torch.arange(start, stop, device="cpu") for start, stop in spans])


def _is_everything(call: Call, query: Tensor, key: Tensor) -> bool:
    """Whether one call is over the whole of the batch, so that its output needs no copy."""
    everything = (Span(0, query.shape[2]),)
    whole = call.rows == (0, query.shape[0]) and call.queries == call.keys == everything
    return whole and key.shape[2] == query.shape[2]


def _take(x: Tensor, rows: Span, spans: Spans) -> Tensor:
    """Spans of the tokens (dimension 2) of some rows, one behind the other; a view where it is one."""
    parts = [x[rows.start : rows.stop, :, start:stop] for start, stop in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _put(x: Tensor, rows: Span, spans: Spans, values: Tensor, add: bool = False) -> None:
    parts = values.split([stop - start for start, stop in spans], 2)
    for (start, stop), part in zip(spans, parts, strict=True):
        place = x[rows.start : rows.stop, :, start:stop]
        place.add_(part) if add else place.copy_(part)
