"""The flex backend: a rule as FlexAttention's BlockMask."""

from __future__ import annotations

from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from aki.attention.rules import Rule
from aki.layout import SequenceLayout


def block_mask(rule: Rule, layout: SequenceLayout) -> BlockMask:
    """Who sees whom, as the blocks that FlexAttention computes; any rule, any layout.

    FlexAttention has no backward on the CPU. There the blocks are found through a mask of length by length, on CUDA by
    a compiled kernel that makes none.
    """
    batch, length = layout.shape
    device = layout.document.device

    def sees(b: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return rule.sees(layout, b, q, k)

    return create_block_mask(sees, batch, None, length, length, device=device, _compile=device.type == "cuda")
