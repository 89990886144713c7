"""Keys and values that earlier steps left in a layer's cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class CachedKeys:
    """The cache of one layer during a step.

    Args:
        layer: an attention layer of vLLM.
        kv_cache: its cache, (blocks, key heads, tokens of a block, widths of keys and values).
        metadata: of the step, with its table of blocks.
    """

    def __init__(self, layer: Any, kv_cache: Tensor, metadata: Any):
        self.layer, self.kv_cache, self.metadata = layer, kv_cache, metadata

    def read(self, row: int, count: int) -> tuple[Tensor, Tensor]:
        """The first `count` keys and values of the request at `row`: (count, key heads, width) both."""
        size = self.kv_cache.shape[2]
        table = self.metadata.block_table[row, : -(-count // size)].long()
        blocks = self.kv_cache[table]
        raise NotImplementedError(blocks.shape)
