"""The flex backend: a rule as FlexAttention's BlockMask."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad

from aki.attention.rules import Rule
from aki.layout import SequenceLayout

_BLOCK = 128


_LENGTHS = 256
"""For so many lengths it is compiled. Beyond torch's own limit of 8 it would hold every score, length by length."""


@cache
def compiled_for_cpu():
    """FlexAttention, compiled anew for each length: with lengths left open, torch 2.13 writes C++ that is not valid.

    It raises `torch._dynamo.exc.FailOnRecompileLimitHit` past 256 lengths.
    """
    compiled = torch.compile(flex_attention, dynamic=False)
    return torch._dynamo.config.patch(recompile_limit=_LENGTHS, fail_on_recompile_limit_hit=True)(compiled)


def block_mask(rule: Rule, layout: SequenceLayout) -> BlockMask:
    """Who sees whom, as the blocks that FlexAttention computes; any rule, any layout.

    The blocks are found one row of blocks after the other: a mask of length by length never exists, as it would in
    torch's own `create_block_mask` where that is not compiled.
    """
    length = layout.shape[1]

    def sees(b: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return rule.sees(layout, b, q, k)

    found = [_row_of_blocks(rule, layout, start) for start in range(0, length, _BLOCK)]
    some, every = (torch.stack(blocks, dim=1)[:, None] for blocks in zip(*found, strict=True))
    return BlockMask.from_kv_blocks(
        *_in_order(some & ~every),
        *_in_order(every),
        BLOCK_SIZE=_BLOCK,
        mask_mod=sees,
        seq_lengths=(length, length),
    )


def _row_of_blocks(rule: Rule, layout: SequenceLayout, start: int) -> tuple[Tensor, Tensor]:
    """For 128 queries from `start`: which blocks of 128 keys they see anything of, and which they see all of.

    Returns:
        Two (batch, blocks of keys) bool.
    """
    batch, length = layout.shape
    position = torch.arange(length, device=layout.document.device)
    rows = torch.arange(batch, device=position.device)[:, None, None]
    allowed = rule.sees(layout, rows, position[start : start + _BLOCK, None], position)
    missing_queries, missing_keys = _BLOCK - allowed.shape[1], -length % _BLOCK
    blocks = pad(allowed, (0, missing_keys, 0, missing_queries)).unflatten(-1, (-1, _BLOCK))
    return blocks.any(-1).any(1), blocks.all(-1).all(1)


def _in_order(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks a row has, and their numbers first, as FlexAttention wants them."""
    count = blocks.sum(-1, dtype=torch.int32)
    return count, blocks.int().argsort(dim=-1, descending=True, stable=True).int()
