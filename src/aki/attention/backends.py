"""The backends `segments` and `auto`, as transformers knows attention: a function, and a maker of masks.

What a language model is given as its 4-D `attention_mask` says how a layer computes: a plan (integers) is attention by
segments, everything else (boolean masks, none) is transformers' own sdpa. transformers hands prepared masks to every
layer as they are, so no language model has to know of this.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from aki.attention.choice import BACKENDS, Choice, announce, choose, computed_in, is_causal, sees_everything, unfit
from aki.attention.dense import language_model_masks
from aki.attention.kernels import segment_attention
from aki.attention.rules import Rule
from aki.attention.segments import encode, is_plan, segments
from aki.layout import SequenceLayout


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """An attention function as `transformers.AttentionInterface` has them; what it does depends on the mask's kind.

    Returns:
        (batch, queries, heads, width), and None for the weights.

    Raises:
        ValueError: a layer asks for what cannot be had here: soft-capping, sinks; of segments dropout, a position bias.
    """
    asked = {**kwargs, "dropout": dropout or None}
    names = ["softcap", "s_aux", *(("position_bias", "dropout") if is_plan(attention_mask) else ())]
    refused = [name for name in names if asked.get(name) is not None]
    if refused:
        raise ValueError(
            f"attention here cannot compute {', '.join(refused)}, which this language model asks for: load it with "
            "attn_implementation='eager'."
        )
    if not is_plan(attention_mask):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    # As scaled_dot_product_attention: rotary embeddings leave query and key in float32.
    query, key, value = (x.to(computed_in(query)) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return segment_attention(query, key, value, attention_mask, scale).transpose(1, 2), None


def settle(decoder: PreTrainedModel) -> None:
    """A decoder whose layers ask for what sdpa does not compute (caps, sinks) keeps its own eager attention."""
    # Older releases say that Gemma 2 takes sdpa, and leave its caps out.
    caps = getattr(decoder.config, "attn_logit_softcapping", None) is not None
    if decoder.config._attn_implementation in BACKENDS and (caps or not decoder._supports_sdpa):
        name = type(decoder).__name__
        announce(Choice("dense", f"sdpa does not compute {name}'s attention (caps, sinks), its own eager one does"))
        decoder.config._attn_implementation = {"": "eager"}


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
) -> Tensor | dict | None:
    """What a language model takes as `attention_mask` so that its layers compute this rule: a mask, or a plan.

    Arguments are those of `aki.attention.language_model_masks`; where the model's layers are of several types, the
    answer is a dictionary by type.

    Args:
        layout: where it is on the CPU, nothing is copied from the device of the model.
    """
    dense_arguments = (config, inputs_embeds, attention_mask, past_key_values, position_ids)

    def dense() -> Tensor | dict:
        return language_model_masks(rule, layout.to(inputs_embeds.device), *dense_arguments)

    if not takes_prepared(config, past_key_values):
        name = config._attn_implementation
        announce(Choice("dense", "tokens are cached" if name in BACKENDS else f"attn_implementation is {name!r}"))
        return dense()
    found = tuple(segments(rule, layout))
    reason = unfit(config, inputs_embeds.device, computed_in(inputs_embeds), layout.shape[1])
    if reason is not None:
        choice = Choice("none" if is_causal(found) else "dense", reason)
    else:
        choice = choose(config._attn_implementation, found, layout, inputs_embeds, config.num_attention_heads)
    announce(choice)
    if choice.backend == "none":
        return attention_mask
    if choice.backend == "dense":
        return dense()
    plan, full = encode(found), sees_everything(config, layout.shape[1])
    if getattr(config, "layer_types", None) is None:
        return plan
    plans: dict[str, Tensor] = {kind: plan for kind, sees_all in full.items() if sees_all}
    if len(plans) == len(full):
        return plans
    windowed = ", ".join(sorted(full.keys() - plans.keys()))
    announce(Choice("dense", f"the batch is longer than the window of layers of kind {windowed}"))
    masks = dense()
    assert isinstance(masks, dict)
    return masks | plans


for _name in BACKENDS:
    AttentionInterface.register(_name, attention)
    AttentionMaskInterface.register(_name, sdpa_mask)
