"""Merged attention: causal plus rectangles without a mask.

The softmax over a union of disjoint key sets is a merge of the softmaxes over each. With o_i, l_i the output and the
log-sum-exp over key set i:

    l = log(exp(l_1) + exp(l_2))        o = exp(l_1 - l) o_1 + exp(l_2 - l) o_2

So the library's kernel runs once causally and once on each rectangle, and the rows that both touch are merged. The
gradient of a score depends on its own key and on (o, l) only, so the kernel's backward, called with the merged (o, l),
gives each part's share, and the shares add up.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import groupby

import torch
from torch import Tensor

from aki.attention import varlen
from aki.attention.kernels import Kernel, Shape, choose_kernel
from aki.attention.rectangles import Part, decode_plan, squares_and_rectangles


def merged_attention(query: Tensor, key: Tensor, value: Tensor, plan: Tensor, scale: float) -> Tensor:
    """Attention over the pairs that a plan names; differentiable once.

    Args:
        query: (batch, heads, queries, width), float64, float32, bfloat16 or float16.
        key, value: (batch, key heads, keys, width); heads is a multiple of key heads.
        plan: (1, 1, calls, 7) int64 from `aki.attention.rectangles.encode_plan`.
        scale: of the scores, before the softmax.

    Returns:
        (batch, heads, queries, width); zero for queries in no part (padding).

    Raises:
        ValueError: value has another width than key, or there is no kernel for the device.
    """
    if value.shape[-1] != key.shape[-1]:
        raise ValueError(
            f"merged attention needs keys and values of one width, they have {key.shape[-1]} and {value.shape[-1]}: "
            "load the language model with attn_implementation='sdpa'."
        )
    return _merged(query, key, value, plan, scale)[0]


@torch.library.custom_op("aki::merged_attention", mutates_args=())
def _merged(query: Tensor, key: Tensor, value: Tensor, plan: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    query, key, value = (_rows_contiguous(x) for x in (query, key, value))
    kernel, parts = choose_kernel(query), decode_plan(plan)
    if kernel.varlen is not None and _many_documents(parts):
        out, lse = varlen.forward(kernel.varlen, query, key, value, parts, scale)
        return _tokens_first(out), lse
    squares, rectangles = _calls(parts, kernel, query)
    if squares and _covers(squares[0][0], query, key):
        out, lse = (_tokens_first(x) for x in kernel.forward(query, key, value, squares[0][1], scale))
    else:
        out, lse = _empty_result(query)
        out.zero_()
        for part, shape in squares:
            part_out, part_lse = kernel.forward(
                _queries(query, part), _keys(key, part), _keys(value, part), shape, scale
            )
            _queries(out, part).copy_(part_out)
            _queries(lse, part).copy_(part_lse)
    for _, same_queries in groupby(rectangles, key=_queries_of):
        _merge(kernel, query, key, value, list(same_queries), scale, out, lse)
    return out, lse


def _merge(
    kernel: Kernel,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    parts: list[Part],
    scale: float,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Merge rectangles that have their queries in common into (out, lse)."""
    held, held_lse = _queries(out, parts[0]), _queries(lse, parts[0])
    merged = held.to(held_lse.dtype)
    for part in parts:
        more, more_lse = kernel.forward(_queries(query, part), _keys(key, part), _keys(value, part), False, scale)
        merged.lerp_(more.to(merged.dtype), torch.sigmoid(more_lse - held_lse)[..., None])
        held_lse.copy_(torch.logaddexp(held_lse, more_lse))
    if merged is not held:
        held.copy_(merged)


@_merged.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, plan: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return _empty_result(query)


@torch.library.custom_op("aki::merged_attention_backward", mutates_args=())
def _merged_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, plan: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    grad, query, key, value = (_rows_contiguous(x) for x in (grad, query, key, value))
    kernel, parts = choose_kernel(query), decode_plan(plan)
    if kernel.varlen is not None and _many_documents(parts):
        return varlen.backward(kernel.varlen, grad, query, key, value, out, lse, parts, scale)
    squares, rectangles = _calls(parts, kernel, query)
    calls = squares + [(part, False) for part in rectangles]
    if squares and _covers(squares[0][0], query, key):
        shares = kernel.backward(grad, query, key, value, out, lse, squares[0][1], scale)
        query_gradient, key_gradient, value_gradient = (_tokens_first(x) for x in shares)
        calls = calls[1:]
    else:
        query_gradient, key_gradient, value_gradient = (_tokens_first_like(x).zero_() for x in (query, key, value))
    for part, shape in calls:
        shares = kernel.backward(
            *(_queries(grad, part), _queries(query, part), _keys(key, part), _keys(value, part)),
            *(_queries(out, part), _queries(lse, part), shape, scale),
        )
        _queries(query_gradient, part).add_(shares[0])
        _keys(key_gradient, part).add_(shares[1])
        _keys(value_gradient, part).add_(shares[2])
    return query_gradient, key_gradient, value_gradient


@_merged_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, plan: Tensor, scale: float):
    return _tokens_first_like(query), _tokens_first_like(key), _tokens_first_like(value)


def _setup_context(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    query, key, value, plan, scale = inputs
    ctx.save_for_backward(query, key, value, *output, plan)
    ctx.scale = scale
    ctx.set_materialize_grads(False)


def _backward(ctx, grad: Tensor, grad_lse: Tensor | None):
    query, key, value, out, lse, plan = ctx.saved_tensors
    return *_merged_backward(grad, query, key, value, out, lse, plan, ctx.scale), None, None


_merged.register_autograd(_backward, setup_context=_setup_context)


def _empty_result(query: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, queries, _ = query.shape
    precise = torch.float64 if query.dtype == torch.float64 else torch.float32
    lse = torch.empty((batch, queries, heads), dtype=precise, device=query.device).transpose(1, 2)
    return _tokens_first_like(query), lse


def _tokens_first_like(x: Tensor) -> Tensor:
    """Empty, in the order in memory that the kernels write: (batch, tokens, heads, ...)."""
    return torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


def _tokens_first(x: Tensor) -> Tensor:
    """The same in that order, which is what the shapes without data (above, for torch.compile) promise."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _calls(parts: list[Part], kernel: Kernel, query: Tensor) -> tuple[list[tuple[Part, Shape]], list[Part]]:
    """The causal squares with how to compute them, and the rectangles that are left."""
    squares, rectangles = squares_and_rectangles(parts, kernel.masked_length)
    return [(square, _square_mask(square, own, query) if own else True) for square, own in squares], rectangles


def _square_mask(square: Part, rectangles: list[Part], query: Tensor) -> Tensor:
    """(length, length) of the square: 0 where its tokens are seen, -inf elsewhere."""
    start = square.first_query
    spans = tuple(tuple(edge - start for edge in part[2:6]) for part in rectangles)
    return _mask_of(square.stop_query - start, spans, query.dtype, query.device)


@lru_cache(maxsize=64)
def _mask_of(length: int, spans: tuple[tuple[int, ...], ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Kept for the layers to come, which compute the same batch."""
    with torch.inference_mode(False):
        mask = torch.full((length, length), -torch.inf, dtype=dtype, device=device).triu_(1)
        for first_query, stop_query, first_key, stop_key in spans:
            mask[first_query:stop_query, first_key:stop_key] = 0
    return mask


def _covers(part: Part, query: Tensor, key: Tensor) -> bool:
    """Whether one square is the whole of the batch."""
    length = query.shape[2]
    return part[:4] == (0, query.shape[0], 0, length) and key.shape[2] == length


def _many_documents(parts: list[Part]) -> bool:
    return sum(part.is_causal for part in parts) > 1


def _queries_of(part: Part) -> tuple[int, ...]:
    return part[:4]


def _queries(x: Tensor, part: Part) -> Tensor:
    return x[part.first_row : part.stop_row, :, part.first_query : part.stop_query]


def _keys(x: Tensor, part: Part) -> Tensor:
    return x[part.first_row : part.stop_row, :, part.first_key : part.stop_key]
