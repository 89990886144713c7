"""Keys and values that earlier steps left in a layer's cache, for rows that come after a cached prefix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from aki.vllm.settings import CannotServe

Pages = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""Blocks of a cache (blocks, key heads, tokens, content) and the width of keys, to keys and values of
(blocks, tokens, key heads, width)."""


def _logical(blocks: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """vLLM's logical shape: of each token its key, then its value."""
    paged = blocks.transpose(1, 2)
    return paged[..., :width], paged[..., width:]


def _cpu(blocks: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The CPU kernel's own: of each head all keys, by width, then all values, by token."""
    count, heads, tokens, _ = blocks.shape
    keys, values = blocks.reshape(count, heads, 2 * tokens, width).chunk(2, dim=2)
    keys = keys.reshape(count, heads, width, tokens).transpose(2, 3)
    return keys.transpose(1, 2), values.transpose(1, 2)


LAYOUTS: tuple[Pages, ...] = (_logical, _cpu)


def read(pages: Pages, layer: Any, kv_cache: Tensor, table: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first `count` keys and values of a request: (count, key heads, width) both.

    Args:
        kv_cache: of the layer, (blocks, key heads, tokens of a block, content).
        table: (blocks,) int, where the request's tokens are.
    """
    used = table[: -(-count // kv_cache.shape[2])].long()
    keys, values = pages(kv_cache[used], layer.head_size)
    return keys.flatten(0, 1)[:count], values.flatten(0, 1)[:count]


def find_layout(name: str, layer: Any) -> Pages:
    """How a layer's cache is laid out, found by writing tokens through its backend and reading them back.

    It is written into block 0, which vLLM keeps for nobody.

    Raises:
        CannotServe: the backend cannot be asked, or lays them out in a way that is not known.
    """
    cache = layer.kv_cache
    update = getattr(layer.impl, "do_kv_cache_update", None)
    if update is not None and not layer.attn_backend.forward_includes_kv_cache_update and cache.ndim == 4:
        tokens = cache.shape[2]
        generator = torch.Generator().manual_seed(0)
        shape = (2, tokens, layer.num_kv_heads, layer.head_size)
        key, value = torch.randn(shape, generator=generator).to(cache.device, layer.dtype)
        update(layer, key, value, cache, torch.arange(tokens, device=cache.device))
        for pages in LAYOUTS:
            found = read(pages, layer, cache, torch.zeros(1, device=cache.device), tokens)
            if all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(found, (key, value), strict=True)):
                return pages
    raise CannotServe(
        f"the cache of the layer {name} ({layer.attn_backend.get_name()}) is laid out in a way that aki does not know, "
        "and rows behind a cached prefix need its keys: start vLLM with --no-enable-prefix-caching."
    )
