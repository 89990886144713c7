"""The dense backend: the rule as a boolean mask, built in one broadcast, for `eager` and `sdpa`."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig
from transformers.masking_utils import create_masks_for_generate

from aki.attention.choice import BACKENDS
from aki.attention.rules import Rule
from aki.layout import SequenceLayout

TAKE_MASKS = ("sdpa", "eager", *BACKENDS)


def dense_mask(rule: Rule, layout: SequenceLayout) -> Tensor:
    """Who sees whom, as (batch, length, length) bool."""
    batch, length = layout.shape
    position = torch.arange(length, device=layout.document.device)
    rows = torch.arange(batch, device=position.device)[:, None, None]
    return rule.sees(layout, rows, position[:, None], position)


def language_model_masks(
    rule: Rule,
    layout: SequenceLayout,
    config: PreTrainedConfig,
    inputs_embeds: Tensor,
    attention_mask: Tensor | dict[str, Tensor | None] | None,
    past_key_values: Cache | None,
    position_ids: Tensor | None,
) -> Tensor | dict[str, Tensor]:
    """The masks that a transformers language model takes as `attention_mask`: one, or one a layer type.

    transformers makes the model's own masks (causal, windows, chunks, padding, cache sizes), unless they come ready
    made. The rule is then laid over the tokens of this call: what it opens ahead is added, what it closes behind is
    taken away. Tokens already in the cache stay as the model's own mask has them: decoding after a prefill is causal.

    Args:
        layout: of the tokens of this call, (batch, query length).
        config: the language model's.
        inputs_embeds: (batch, query length, hidden), for dtype and device.
        attention_mask: (batch, cached + query length), 0 is padding; or the model's own masks, (batch, 1, query length,
            key length), one or one a layer type.

    Returns:
        (batch, 1, query length, key length), 0 and -inf (the dtype's minimum) for eager, bool elsewhere.

    Raises:
        ValueError: the attention implementation takes no masks (FlashAttention).
    """
    check_takes_masks(rule, config)
    implementation = config._attn_implementation
    own: Any = attention_mask
    if not is_prepared(attention_mask):
        boolean_config = copy.copy(config)
        boolean_config._attn_implementation = "sdpa"
        own = create_masks_for_generate(boolean_config, inputs_embeds, own, past_key_values, position_ids=position_ids)
    allowed = dense_mask(rule, layout)[:, None]

    def overlay(own_mask: Tensor | None, layer: int) -> Tensor:
        mask = _overlay(allowed, as_boolean(own_mask), past_key_values, layer)
        return _additive(mask, inputs_embeds.dtype) if implementation == "eager" else mask

    if isinstance(own, dict):
        return {kind: overlay(mask, config.layer_types.index(kind)) for kind, mask in own.items()}
    return overlay(own, 0)


def check_takes_masks(rule: Rule, config: PreTrainedConfig) -> None:
    """
    Raises:
        ValueError: the attention implementation takes no masks (FlashAttention).
    """
    if config._attn_implementation not in TAKE_MASKS:
        raise ValueError(
            f"the rule {rule.name!r} needs a mask, which attn_implementation={config._attn_implementation!r} cannot "
            "take: load the model with attn_implementation='sdpa' or 'eager'."
        )


def is_prepared(attention_mask: Tensor | dict[str, Tensor | None] | None) -> bool:
    """Whether these are masks that a model takes as they are, not (batch, length) with 0 for padding."""
    return isinstance(attention_mask, dict) or (attention_mask is not None and attention_mask.ndim == 4)


def as_boolean(mask: Tensor | None) -> Tensor | None:
    """True where a token is seen, from a mask for sdpa or for eager."""
    return mask if mask is None or mask.dtype == torch.bool else mask == 0


def _overlay(allowed: Tensor, own: Tensor | None, cache: Cache | None, layer: int) -> Tensor:
    """Lay `allowed` (batch, 1, query, query) over the model's own mask (batch, 1, query, keys)."""
    length, device = allowed.shape[-1], allowed.device
    seen = int(cache.get_query_offset(layer)) if cache is not None else 0
    keys, first_key = cache.get_mask_sizes(length, layer) if cache is not None else (length, 0)
    key = torch.arange(keys, device=device) + first_key - seen
    query = torch.arange(length, device=device)[:, None]
    in_call = (key >= 0) & (key < length)
    ruled = allowed if keys == length and first_key == seen else allowed[..., key.clamp(0, length - 1)] & in_call
    behind = key <= query
    # None is transformers' shorthand for plain causal attention.
    own = behind if own is None else own
    # Behind, both must agree; ahead, what either opens is open (some models show an image's tokens to each other).
    return (own & (ruled | ~in_call | ~behind)) | (ruled & ~behind)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
