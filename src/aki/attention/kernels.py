"""Attention by segments, as one operator for every device: the plan of a batch says which calls compute it."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from aki.attention import cpu, varlen
from aki.attention.segments import Segment, decode


def no_kernel(device: torch.device, dtype: torch.dtype, width: int) -> str | None:
    """Why there is no fused kernel for these tensors; None where there is one.

    Args:
        width: of a head.
    """
    if device.type in ("cpu", "meta"):
        return None
    if device.type != "cuda":
        return f"there is no kernel for {device.type!r}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"FlashAttention takes half precision, and this is {dtype}"
    return None if width % 8 == 0 and width <= 256 else f"FlashAttention takes no heads of width {width}"


def segment_attention(query: Tensor, key: Tensor, value: Tensor, plan: Tensor, scale: float) -> Tensor:
    """Attention over the pairs that a plan names; differentiable once.

    Args:
        query: (batch, heads, queries, width); float64, float32, bfloat16 or float16 on the CPU, the last two on CUDA.
        key, value: (batch, key heads, keys, width); heads is a multiple of key heads. Keys beyond the queries (room in
            a static cache) are not seen.
        plan: (1, 1, spans, 7) int64 from `aki.attention.segments.encode`.
        scale: of the scores, before the softmax.

    Returns:
        (batch, heads, queries, width); zero for queries in no segment (padding).

    Raises:
        ValueError: value has another width than key, or there is no kernel for these tensors.
    """
    reason = no_kernel(query.device, query.dtype, query.shape[-1])
    if value.shape[-1] != key.shape[-1]:
        reason = f"keys have the width {key.shape[-1]}, values {value.shape[-1]}"
    if reason is not None:
        raise ValueError(f"attention by segments: {reason}. Load the model with attn_implementation='sdpa'.")
    return _attend(query, key, value, plan, scale)[0]


@torch.library.custom_op("aki::segment_attention", mutates_args=())
def _attend(query: Tensor, key: Tensor, value: Tensor, plan: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    query, key, value = (_rows_contiguous(x) for x in (query, key, value))
    if _is_cpu(query):
        return cpu.forward(query, key, value, cpu.calls(_segments(plan)), scale)
    return varlen.forward(varlen.FLASH, query, key, value, _segments(plan), scale)


@_attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, plan: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return cpu.empty_result(query)


@torch.library.custom_op("aki::segment_attention_backward", mutates_args=())
def _attend_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, plan: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    grad, query, key, value = (_rows_contiguous(x) for x in (grad, query, key, value))
    if _is_cpu(query):
        return cpu.backward(grad, query, key, value, out, lse, cpu.calls(_segments(plan)), scale)
    return varlen.backward(varlen.FLASH, grad, query, key, value, out, lse, _segments(plan), scale)


@_attend_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, plan: Tensor, scale: float):
    return tuple(cpu.tokens_first_like(x) for x in (query, key, value))


def _setup_context(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    query, key, value, plan, scale = inputs
    ctx.save_for_backward(query, key, value, *output, plan)
    ctx.scale = scale
    ctx.set_materialize_grads(False)


def _backward(ctx, grad: Tensor, grad_lse: Tensor | None):
    query, key, value, out, lse, plan = ctx.saved_tensors
    return *_attend_backward(grad, query, key, value, out, lse, plan, ctx.scale), None, None


_attend.register_autograd(_backward, setup_context=_setup_context)


def _segments(plan: Tensor) -> tuple[Segment, ...]:
    """Decoded once for all layers that compute the same batch."""
    return _decoded(plan.cpu().numpy().tobytes())


@lru_cache(maxsize=8)
def _decoded(content: bytes) -> tuple[Segment, ...]:
    return tuple(decode(torch.frombuffer(bytearray(content), dtype=torch.int64))) if content else ()


def _is_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu"


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
