"""One call from what the tokens are to what the language model is called with: its mask, its positions, its cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig

from aki.attention import Rule, prepare_attention
from aki.attention.backends import takes_prepared
from aki.compat import CACHE
from aki.layout import SequenceLayout, is_packed, moved

Mask = Tensor | dict | None


def needs_layout(rule: Rule, config: PreTrainedConfig, shows_media: bool, length: int, cache: Cache | None) -> bool:
    """Whether the rule can open anything in this call, or the language model wants prepared attention in any case."""
    return beyond_causal(rule, shows_media, length) or takes_prepared(config, cache)


def beyond_causal(rule: Rule, shows_media: bool, length: int) -> bool:
    """Whether a rule can be other than causal attention in a call of so many tokens."""
    return rule.name != "causal" and (shows_media or (rule.changes_text and length > 1))


def blocks_of_call(blocks: Tensor | None, length: int, cache: Cache | None, input_ids: Tensor | None) -> Tensor | None:
    """Prompt blocks of this call's tokens: (batch, length).

    Args:
        blocks: those, or with those of cached tokens before them; or without those of soft prompts, which are
            embeddings that stand before all else.
    """
    if blocks is None or blocks.shape[1] == length:
        return blocks
    if input_ids is None and blocks.shape[1] < length:
        return nn.functional.pad(blocks, (length - blocks.shape[1], 0), value=-1)
    cached = cache is not None and blocks.shape[1] == int(cache.get_seq_length()) + length
    return blocks[:, -length:] if cached else blocks


def padding_of(attention_mask: Mask) -> Tensor | None:
    """(batch, cached + length), 0 is padding; None where nothing is padded, or where masks come ready made."""
    return attention_mask if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2 else None


def counted(attention_mask: Mask, position_ids: Tensor | None, length: int) -> Tensor | None:
    """Position ids as given, else counted over the padding mask, which may be on any side: (batch, length) int64."""
    padding = padding_of(attention_mask)
    if position_ids is not None or padding is None:
        return position_ids
    return (padding.long().cumsum(1) - 1).clamp(min=0)[:, -length:]


def decoder_inputs(
    rule: Rule,
    layout: SequenceLayout | None,
    config: PreTrainedConfig,
    inputs_embeds: Tensor,
    attention_mask: Mask,
    position_ids: Tensor | None,
    cache: Cache | None,
) -> dict[str, Any]:
    """What the language model is called with so that its layers compute the rule.

    Args:
        layout: of the tokens of this call, (batch, length), best on the CPU; None where the language model's own masks
            will do.
        config: the language model's.
        inputs_embeds: (batch, length, width).
        attention_mask: (batch, cached + length), 0 is padding; or masks ready made, which stay as they are.
        position_ids: (batch, length), as given to the model.
    """
    length, padding = inputs_embeds.shape[1], padding_of(attention_mask)
    asked: dict[str, Any] = {
        "inputs_embeds": inputs_embeds,
        "attention_mask": attention_mask,
        "position_ids": counted(attention_mask, position_ids, length),
        CACHE: cache,
    }
    if attention_mask is None and cache is None and position_ids is not None and is_packed(position_ids, layout):
        # transformers keeps packed documents apart only where no cache is made.
        asked["use_cache"] = False
    ready_made = attention_mask is not None and padding is None
    if ready_made or layout is None or not needs_layout(rule, config, True, length, cache):
        return asked
    asked["attention_mask"] = prepare_attention(
        rule, layout, config, inputs_embeds, padding, cache, asked["position_ids"]
    )
    # Behind cached tokens positions are counted over those too, elsewhere.
    if rule.positions is not None and (cache is None or int(cache.get_seq_length()) == 0):
        asked["position_ids"] = moved(rule.positions(layout), inputs_embeds.device)
    return asked


def identify(inputs_embeds: Tensor, embeddings: nn.Module, token_ids: list[int]) -> Tensor:
    """Which of these tokens stand where, found by their embeddings: (batch, length) int64, -1 for every other token.

    Args:
        inputs_embeds: (batch, length, width).
        embeddings: of the vocabulary, token ids -> (..., width).
    """
    found = torch.full(inputs_embeds.shape[:2], -1, dtype=torch.long, device=inputs_embeds.device)
    for token_id in token_ids:
        own = embeddings(torch.full((), token_id, dtype=torch.long, device=inputs_embeds.device))
        found = found.masked_fill((inputs_embeds == own.to(inputs_embeds)).all(-1), token_id)
    return found
