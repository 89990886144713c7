"""How `mma` was computed before segments, so that one run of attention.py has both: causal attention and rectangles.

A causal call a document, one a picture over what it sees ahead, and both merged by log-sum-exp (`aki/attention/cpu.py`
has the formula). On a CPU a document of up to 512 tokens is one call with a mask.
"""

from __future__ import annotations

from itertools import groupby

import torch
from torch import Tensor

from aki.layout import TEXT, SequenceLayout

MASKED = 512
Call = tuple[slice, slice, bool | Tensor]
"""Queries, keys, and which pairs: the causal ones, all, or those of a mask."""


def calls(layout: SequenceLayout, device: str, dtype: torch.dtype) -> list[Call]:
    """Of a batch of one row without padding: the causal ones first."""
    kinds = torch.stack([layout.document[0], layout.modality[0], layout.prompt_block[0]], 1).tolist()
    squares: list[Call] = []
    rectangles: list[Call] = []
    for _, tokens in groupby(range(len(kinds)), key=lambda i: kinds[i][0]):
        runs = [list(run) for _, run in groupby(tokens, key=lambda i: kinds[i])]
        start, stop = runs[0][0], runs[-1][-1] + 1
        own = [
            (slice(media[0], media[-1] + 1), slice(later[0], later[-1] + 1), False)
            for number, media in enumerate(runs)
            for later in runs[number + 1 :]
            if kinds[media[0]][1] not in (TEXT, kinds[later[0]][1]) and kinds[media[0]][2] == kinds[later[0]][2] >= 0
        ]
        shape: bool | Tensor = True
        if own and device == "cpu" and stop - start <= MASKED:
            shape = torch.full((stop - start, stop - start), -torch.inf, dtype=dtype).triu_(1)
            for queries, keys, _ in own:
                shape[queries.start - start : queries.stop - start, keys.start - start : keys.stop - start] = 0
            own = []
        squares.append((slice(start, stop), slice(start, stop), shape))
        rectangles += own
    return squares + rectangles


class Merged(torch.autograd.Function):
    """(query, key, value, calls): each (1, heads, tokens, width); returns the same."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, made: list[Call]) -> Tensor:
        out, lse = torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)
        for queries, keys, shape in made:
            part, part_lse = _forward(query[:, :, queries], key[:, :, keys], value[:, :, keys], shape)
            held, held_lse = out[:, :, queries], lse[:, :, queries]
            if shape is False:
                part = held.float().lerp(part.float(), torch.sigmoid(part_lse - held_lse)[..., None])
                part_lse = torch.logaddexp(held_lse, part_lse)
            held.copy_(part)
            held_lse.copy_(part_lse)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.made = made
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        query, key, value, out, lse = ctx.saved_tensors
        gradients = [torch.zeros_like(x) for x in (query, key, value)]
        for queries, keys, shape in ctx.made:
            of_queries = (x[:, :, queries] for x in (grad, query, out, lse))
            shares = _backward(of_queries, key[:, :, keys], value[:, :, keys], shape)
            for gradient, at, share in zip(gradients, (queries, keys, keys), shares, strict=True):
                gradient[:, :, at] += share
        return *gradients, None


def _forward(query: Tensor, key: Tensor, value: Tensor, shape: bool | Tensor) -> tuple[Tensor, Tensor]:
    if query.is_cuda:
        ends = (None, None, query.shape[2], key.shape[2], 0.0, shape is True, False)
        out, lse, *_ = torch.ops.aten._flash_attention_forward(*(x.transpose(1, 2) for x in (query, key, value)), *ends)
        return out.transpose(1, 2), lse
    mask = shape if isinstance(shape, Tensor) else None
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, shape is True, attn_mask=mask
    )


def _backward(of_queries, key: Tensor, value: Tensor, shape: bool | Tensor) -> tuple[Tensor, ...]:
    grad, query, out, lse = of_queries
    if query.is_cuda:
        tokens_first = (x.transpose(1, 2) for x in (grad, query, key, value, out))
        unused = torch.empty(0, dtype=torch.uint64, device=query.device)
        ends = (None, None, query.shape[2], key.shape[2], 0.0, shape is True, unused, unused)
        shares = torch.ops.aten._flash_attention_backward(*tokens_first, lse.contiguous(), *ends)
        return tuple(share.transpose(1, 2) for share in shares)
    mask = shape if isinstance(shape, Tensor) else None
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, query, key, value, out, lse, 0.0, shape is True, attn_mask=mask
    )
