"""The fused attention kernels that merged attention is made of: forward with log-sum-exp, and the matching backward.

Every kernel takes query (batch, heads, queries, width) and key, value (batch, key heads, keys, width), none of them
empty, and returns the output with the log-sum-exp (batch, heads, queries) of the scaled scores, natural logarithm. Its
backward takes any output and log-sum-exp, so also those of a softmax over more keys than these.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

Gradients = tuple[Tensor, Tensor, Tensor]
Shape = bool | Tensor
"""Which pairs a call computes: True is the causal ones of a square, False is all, a tensor is added to the scores."""


@dataclass(frozen=True)
class Varlen:
    """A kernel for sequences of several lengths, their tokens one behind the other.

    Attributes:
        forward: (query (queries, heads, width), key, value (keys, key heads, width), where sequences begin in queries
            and in keys (sequences + 1,) int32, the longest of both, causal, scale) -> (output, log-sum-exp (heads,
            queries) float32).
        backward: (grad_output, query, key, value, output, log-sum-exp, and as above) -> gradients of the three.
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., Gradients]


@dataclass(frozen=True)
class Kernel:
    """
    Attributes:
        reason: why it is the one for these tensors.
        forward: (query, key, value, shape, scale) -> (output, log-sum-exp).
        backward: (grad_output, query, key, value, output, log-sum-exp, shape, scale) -> gradients of the three.
        masked_length: up to how many tokens a square with an additive mask costs no more than a causal one; 0 where the
            kernel takes no masks.
        varlen: the same for many sequences at once, where there is such a form.
    """

    name: str
    reason: str
    forward: Callable[[Tensor, Tensor, Tensor, Shape, float], tuple[Tensor, Tensor]]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Shape, float], Gradients]
    masked_length: int = 0
    varlen: Varlen | None = None


def choose_kernel(query: Tensor) -> Kernel:
    """The kernel for this device, dtype and head width; logs it with the reason, the first time.

    Raises:
        ValueError: there is none.
    """
    device, width = query.device.type, query.shape[-1]
    if device == "cpu":
        kernel = CPU_FLASH
    elif device == "cuda" and query.dtype in (torch.float16, torch.bfloat16) and width % 8 == 0 and width <= 256:
        kernel = CUDA_FLASH
    elif device == "cuda" and query.dtype != torch.float64:
        kernel = CUDA_EFFICIENT
    else:
        raise ValueError(
            f"merged attention has no kernel for {query.dtype} on {device!r}: load the language model with "
            "attn_implementation='sdpa'."
        )
    _announce(kernel)
    return kernel


@cache
def _announce(kernel: Kernel) -> None:
    logger.info("merged attention is computed by %s: %s", kernel.name, kernel.reason)


def _cpu_forward(query: Tensor, key: Tensor, value: Tensor, shape: Shape, scale: float) -> tuple[Tensor, Tensor]:
    mask = shape if isinstance(shape, Tensor) else None
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, shape is True, attn_mask=mask, scale=scale
    )


def _cpu_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, shape: Shape, scale: float
) -> Gradients:
    mask = shape if isinstance(shape, Tensor) else None
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, query, key, value, out, lse, 0.0, shape is True, attn_mask=mask, scale=scale
    )


def _flash_forward(query: Tensor, key: Tensor, value: Tensor, shape: Shape, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        *(_tokens_first(x) for x in (query, key, value)),
        None,
        None,
        query.shape[2],
        key.shape[2],
        0.0,
        shape is True,
        False,
        scale=scale,
    )
    return out.transpose(1, 2), lse


def _flash_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, shape: Shape, scale: float
) -> Gradients:
    # Only dropout reads the random state.
    unused = torch.empty(0, dtype=torch.uint64, device=query.device)
    gradients = torch.ops.aten._flash_attention_backward(
        *(_tokens_first(x) for x in (grad, query, key, value, out)),
        lse.contiguous(),
        None,
        None,
        query.shape[2],
        key.shape[2],
        0.0,
        shape is True,
        unused,
        unused,
        scale=scale,
    )
    query_gradient, key_gradient, value_gradient = (gradient.transpose(1, 2) for gradient in gradients)
    return query_gradient, key_gradient, value_gradient


def _flash_varlen_forward(
    query: Tensor, key: Tensor, value: Tensor, query_edges: Tensor, key_edges: Tensor,
    longest_query: int, longest_key: int, is_causal: bool, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As torch.nn.attention.varlen calls the operator."""
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        query, key, value, query_edges, key_edges, longest_query, longest_key, 0.0, is_causal, False, scale=scale
    )
    return out, lse


def _flash_varlen_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, query_edges: Tensor,
    key_edges: Tensor, longest_query: int, longest_key: int, is_causal: bool, scale: float,
) -> Gradients:  # fmt: skip
    # Only dropout reads the random state.
    state = torch.zeros(2, dtype=torch.uint64, device=query.device)
    unused = torch.empty(0, device=query.device)
    return torch.ops.aten._flash_attention_backward(
        grad, query, key, value, out, lse, query_edges, key_edges, longest_query, longest_key, 0.0, is_causal, state,
        unused, scale=scale,
    )  # fmt: skip


def _efficient_forward(query: Tensor, key: Tensor, value: Tensor, shape: Shape, scale: float) -> tuple[Tensor, Tensor]:
    key, value = (_repeat_heads(x, query.shape[1]) for x in (key, value))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, None, True, 0.0, shape is True, scale=scale
    )
    # The kernel pads the queries of the log-sum-exp to a multiple of its tile.
    return out, lse[..., : query.shape[2]]


def _efficient_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, shape: Shape, scale: float
) -> Gradients:
    groups = key.shape[1]
    repeated_key, repeated_value = (_repeat_heads(x, query.shape[1]) for x in (key, value))
    # Only dropout reads the random state.
    unused = torch.zeros((), dtype=torch.int64, device=query.device)
    padded = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % _EFFICIENT_TILE), value=torch.inf)
    query_gradient, key_gradient, value_gradient, _ = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
        grad,
        query,
        repeated_key,
        repeated_value,
        None,
        out,
        padded,
        unused,
        unused,
        0.0,
        [True, True, True, False],
        shape is True,
        scale=scale,
    )
    key_gradient, value_gradient = (x.unflatten(1, (groups, -1)).sum(2) for x in (key_gradient, value_gradient))
    return query_gradient, key_gradient, value_gradient


_EFFICIENT_TILE = 32


def _tokens_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def _repeat_heads(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


CPU_FLASH = Kernel(
    "aten flash, CPU",
    "the only fused kernel of the CPU that returns its log-sum-exp",
    _cpu_forward,
    _cpu_backward,
    # It takes keys in blocks of 512 and skips whole blocks only.
    masked_length=512,
)
CUDA_FLASH = Kernel(
    "aten flash, CUDA",
    "half precision, and heads of a width that flash attention takes",
    _flash_forward,
    _flash_backward,
    varlen=Varlen(_flash_varlen_forward, _flash_varlen_backward),
)
CUDA_EFFICIENT = Kernel(
    "aten efficient, CUDA",
    "float32, or heads of a width that flash attention refuses",
    _efficient_forward,
    _efficient_backward,
)
