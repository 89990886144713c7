"""The backends `merged`, `flex` and `auto`, as transformers knows attention: a function, and a maker of masks.

What a language model is given as its 4-D `attention_mask` says how a layer computes: a plan (integers) is merged
attention, a BlockMask is FlexAttention, everything else (boolean masks, none) is transformers' own sdpa. transformers
hands prepared masks to every layer as they are, so no language model has to know of this.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedConfig
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from aki.attention.choice import BACKENDS, Choice, announce, choose
from aki.attention.dense import language_model_masks
from aki.attention.flex import block_mask, compiled_for_cpu
from aki.attention.merged import merged_attention
from aki.attention.rectangles import Part, encode_plan, is_plan, plan_parts
from aki.attention.rules import Rule
from aki.layout import SequenceLayout


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """An attention function as `transformers.AttentionInterface` has them; what it does depends on the mask's kind.

    Returns:
        (batch, queries, heads, width), and None for the weights.

    Raises:
        ValueError: merged attention is asked for what it cannot compute: dropout, soft-capping, sinks, a position bias.
    """
    if isinstance(attention_mask, BlockMask):
        # A static cache has room for tokens to come.
        key, value = (x[:, :, : attention_mask.shape[-1]] for x in (key, value))
        if query.device.type == "cpu" and kwargs.get("softcap") is None:
            out = compiled_for_cpu()(query, key, value, block_mask=attention_mask, scale=scaling, enable_gqa=True)
            return out.transpose(1, 2).contiguous(), None
        return flex_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    if not is_plan(attention_mask):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    refused = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    refused += ["dropout"] if dropout else []
    if refused:
        raise ValueError(
            f"merged attention cannot compute {', '.join(refused)}, which this language model asks for: load it with "
            "attn_implementation='eager'" + (", or set attention_dropout to 0." if dropout else ".")
        )
    if torch.is_autocast_enabled(query.device.type):
        # As scaled_dot_product_attention: rotary embeddings leave query and key in float32.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return merged_attention(query, key, value, attention_mask, scale).transpose(1, 2), None


def takes_prepared(config: PreTrainedConfig, cache: Cache | None) -> bool:
    """Whether a language model computes by one of these backends, and holds no tokens yet (later ones take a mask)."""
    return config._attn_implementation in BACKENDS and (cache is None or int(cache.get_seq_length()) == 0)


@torch.compiler.disable
def prepare_attention(
    rule: Rule,
    layout: SequenceLayout,
    config: PreTrainedConfig,
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    past_key_values: Cache | None,
    position_ids: Tensor | None,
) -> Tensor | BlockMask | dict | None:
    """What a language model takes as `attention_mask` so that its layers compute this rule: a mask, a plan, or blocks.

    Arguments are those of `aki.attention.language_model_masks`; where the model's layers are of several types, the
    answer is a dictionary by type.

    Raises:
        ValueError: flex with gradients on the CPU.
    """
    dense_arguments = (rule, layout, config, inputs_embeds, attention_mask, past_key_values, position_ids)
    if not takes_prepared(config, past_key_values):
        return language_model_masks(*dense_arguments)
    device = inputs_embeds.device
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else inputs_embeds.dtype
    parts = None if rule.rectangles is None else plan_parts(layout, rule.rectangles(layout))
    shape, requested = (layout.shape[0], layout.shape[1]), config._attn_implementation
    choice = choose(requested, rule, shape, parts, device=device, dtype=dtype, heads=config.num_attention_heads)
    kinds = getattr(config, "layer_types", None)
    full = {kind: _sees_everything(kind, config, layout.shape[1]) for kind in kinds or [_only_kind(config)]}
    if not any(full.values()):
        choice = Choice("dense", "the batch is longer than the layers' window")
    announce(choice)
    if choice.backend == "dense":
        return attention_mask if _is_causal(rule, parts) else language_model_masks(*dense_arguments)
    if choice.backend == "flex" and device.type == "cpu" and torch.is_grad_enabled() and inputs_embeds.requires_grad:
        raise ValueError(
            "FlexAttention has no backward on the CPU: train with attn_implementation='auto', 'merged' or 'sdpa'."
        )
    prepared = block_mask(rule, layout) if parts is None or choice.backend == "flex" else encode_plan(parts)
    if kinds is None:
        return prepared
    masks = dict.fromkeys(full, prepared) if all(full.values()) else language_model_masks(*dense_arguments)
    return {kind: prepared if full[kind] else masks[kind] for kind in full}


def _is_causal(rule: Rule, parts: list[Part] | None) -> bool:
    """Whether nothing is opened ahead, so that the language model's own masks will do."""
    return rule.name == "causal" or (parts is not None and all(part.first_key <= part.first_query for part in parts))


def _only_kind(config: PreTrainedConfig) -> str:
    if getattr(config, "sliding_window", None) is not None:
        return "sliding_attention"
    return "chunked_attention" if getattr(config, "attention_chunk_size", None) is not None else "full_attention"


def _sees_everything(kind: str, config: PreTrainedConfig, length: int) -> bool:
    """Whether layers of this kind see all of a batch of this length; a longer one than their window needs a mask."""
    if kind == "full_attention":
        return True
    window = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}.get(kind)
    size = getattr(config, window, None) if window else None
    return size is not None and length <= size


for _name in BACKENDS:
    AttentionInterface.register(_name, attention)
    AttentionMaskInterface.register(_name, sdpa_mask)
