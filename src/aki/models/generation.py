"""What generation needs beside transformers' own: prompt blocks, images that are not in the cache yet, beams."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationMixin
from transformers.masking_utils import create_masks_for_generate

from aki.attention import get_rule
from aki.compat import CACHE, CACHE_NAMES, given_cache
from aki.layout import SequenceLayout
from aki.models.configuration import AkiConfig
from aki.models.decoder_inputs import beyond_causal
from aki.models.media import Media


class AkiGenerationMixin(GenerationMixin):
    """The prefill goes by the rule, what is decoded after it is causal."""

    config: AkiConfig
    model: Any
    layout: Callable[..., SequenceLayout]

    def generate(self, inputs: Tensor | None = None, *args, **kwargs):
        """As transformers' `generate`; prompt blocks are settled on the prompt, so that answers never join them.

        Raises:
            ValueError: the prompt leaves no room in the model's context, or the rule needs it whole and it is to be
                prefilled in pieces.
        """
        prompt = kwargs.get("inputs_embeds")
        if prompt is None:
            prompt = kwargs.get("input_ids", inputs)
        if prompt is not None:
            self._check_context(prompt.shape[1])
            if kwargs.get("prompt_block_ids") is None:
                kwargs["prompt_block_ids"] = torch.zeros(prompt.shape[:2], dtype=torch.long, device=prompt.device)
        self._check_whole(kwargs)
        cache = given_cache(kwargs)
        kwargs = {name: value for name, value in kwargs.items() if name not in CACHE_NAMES}
        if cache is not None:
            kwargs[CACHE] = cache
        return super().generate(inputs, *args, **kwargs)

    def _check_whole(self, kwargs: dict[str, Any]) -> None:
        rule = get_rule(kwargs.get("attention_rule") or self.config.attention_rule)
        config = kwargs.get("generation_config") or self.generation_config
        size = kwargs.get("prefill_chunk_size") or config.prefill_chunk_size
        shows_media = any(kwargs.get(name) is not None for name in self.config.media)
        if size is not None and (rule.positions is not None or beyond_causal(rule, shows_media, size + 1)):
            raise ValueError(
                f"the rule {rule.name!r} needs the prompt whole, and prefill_chunk_size={size} cuts it into pieces, "
                "which would not see what comes after them: leave prefill_chunk_size out, or generate with "
                "attention_rule='causal'."
            )

    def _check_context(self, length: int) -> None:
        context = getattr(self.config.text_config, "max_position_embeddings", None)
        if context is not None and length >= context:
            items = ", ".join(f"one {m.name} is {m.tokens_per_item} tokens" for m in self.config.media.values())
            raise ValueError(
                f"the prompt has {length} tokens, the model's context is {context}: shorten the text, send fewer "
                f"images, or drop earlier turns ({items})."
            )

    def prepare_inputs_for_generation(
        self,
        input_ids: Any,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs,
    ) -> dict[str, Any]:
        cache = given_cache(kwargs)
        if self._outgrown(cache, input_ids.shape[1]):
            cache = None
            kwargs |= {"next_sequence_length": None}
        kwargs = {name: value for name, value in kwargs.items() if name not in CACHE_NAMES}
        given = {name: kwargs.pop(name, None) for name in self.config.media}
        rule = get_rule(kwargs.get("attention_rule") or self.config.attention_rule)
        seen = 0 if cache is None else int(cache.get_seq_length())
        new_alone = is_first_iteration and kwargs.get("next_sequence_length") is None and inputs_embeds is None
        if seen > 0 and new_alone and (rule.positions is not None or rule.changes_text):
            raise ValueError(
                f"the rule {rule.name!r} needs all tokens, and of those in the cache ({seen}) none are given: pass the "
                "input_ids of all of them, and the new ones behind them."
            )
        so_far = self._so_far(input_ids, inputs_embeds, seen)
        if seen > 0 and so_far.ndim == 2:
            own = self.positions_by_rule(so_far, kwargs.get("attention_mask"), rule.name)
            kwargs |= {} if own is None else {"position_ids": own}
        inputs = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **{CACHE: cache}, **kwargs
        )
        prompt = inputs["input_ids"] if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
        length = prompt.shape[1]
        if inputs.get("prompt_block_ids") is not None:
            # What was generated since is answer.
            answered = max(so_far.shape[1] - inputs["prompt_block_ids"].shape[1], 0)
            inputs["prompt_block_ids"] = nn.functional.pad(inputs["prompt_block_ids"], (0, answered), value=-1)
        for name, values in given.items():
            if values is not None and (is_first_iteration or length > 1):
                values = self._media_from(so_far, so_far.shape[1] - length, self.config.media[name], values)
                inputs[name] = None if values is None else values.to(prompt.device)
        return inputs

    def _so_far(self, input_ids: Tensor, inputs_embeds: Tensor | None, seen: int) -> Tensor:
        """All ids from the first on, those in the cache included; of a prompt of embeddings those that are named."""
        if inputs_embeds is None:
            return input_ids
        missing = (seen + 1 if seen > 0 else inputs_embeds.shape[1]) - input_ids.shape[1]
        return torch.cat([self.model.named_tokens(inputs_embeds)[:, : max(missing, 0)], input_ids], 1)

    def positions_by_rule(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, attention_rule: str | None = None
    ) -> Tensor | None:
        """Position ids of all of these tokens, (batch, length) int64, where the rule has its own (concentric); or None.

        Args:
            input_ids: (batch, length) from the first token on, those in a cache included.
            attention_mask: (batch, length), 0 is padding.
            attention_rule: instead of the configuration's.
        """
        rule = get_rule(attention_rule or self.config.attention_rule)
        if rule.positions is None:
            return None
        nowhere = torch.full_like(input_ids, -1)
        layout = self.layout(
            input_ids, attention_mask=attention_mask, prompt_block_ids=nowhere, attention_rule=rule.name
        )
        return rule.positions(layout)

    def _outgrown(self, cache: Cache | None, length: int) -> bool:
        """Past this length Phi-3's longrope turns keys by other angles: what is cached is computed anew, as by
        transformers' Phi3ForCausalLM."""
        short = getattr(self.config.text_config, "original_max_position_embeddings", None)
        return short is not None and length > short and cache is not None and 0 < cache.get_seq_length() <= short

    def create_masks_for_generate(
        self, attention_mask: Tensor | None = None, is_first_iteration: bool = False, **kwargs
    ) -> Tensor | dict[str, Tensor] | None:
        """With a static cache transformers asks for the masks beforehand. The prefill's is made in forward, by the
        rule; what is decoded after it is causal."""
        if is_first_iteration:
            return attention_mask
        return create_masks_for_generate(attention_mask=attention_mask, **kwargs)

    def _media_from(self, input_ids: Tensor, start: int, media: Media, values: Tensor) -> Tensor | None:
        """Of the prompt's items, those whose placeholders are at `start` or later: the others are in the cache."""
        if start == 0:
            return values
        is_placeholder = input_ids == media.token_id
        items = is_placeholder.sum(1) // media.tokens_per_item
        if int(items.sum()) != values.shape[0]:
            return values
        cached = is_placeholder[:, :start].sum(1) // media.tokens_per_item
        keep = torch.cat([torch.arange(int(n)) >= int(c) for n, c in zip(items, cached, strict=True)])
        return values[keep.to(values.device)] if bool(keep.any()) else None

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **model_kwargs
    ):
        """Beams repeat rows; a row's images are several rows of pixel_values, which must stay together."""
        given = {name: model_kwargs.pop(name, None) for name in self.config.media}
        given = {name: values for name, values in given.items() if values is not None}
        if expand_size > 1 and input_ids is not None:
            for name, values in given.items():
                media = self.config.media[name]
                counts = (input_ids == media.token_id).sum(1) // media.tokens_per_item
                if int(counts.sum()) == values.shape[0]:
                    rows = values.split(counts.tolist())
                    given[name] = torch.cat([row for row in rows for _ in range(expand_size)])
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        return input_ids, model_kwargs | given
