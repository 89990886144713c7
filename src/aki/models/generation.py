"""What generation needs beside transformers' own: prompt blocks, images that are not in the cache yet, beams."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationMixin
from transformers.masking_utils import create_masks_for_generate

from aki.models.configuration import AkiConfig


class AkiGenerationMixin(GenerationMixin):
    """The prefill goes by the rule, what is decoded after it is causal."""

    config: AkiConfig

    def generate(self, inputs: Tensor | None = None, *args, **kwargs):
        """As transformers' `generate`; prompt blocks are settled on the prompt, so that answers never join them.

        Raises:
            ValueError: the prompt leaves no room in the model's context.
        """
        input_ids = kwargs.get("input_ids", inputs)
        if input_ids is not None:
            self._check_context(input_ids.shape[1])
            if kwargs.get("prompt_block_ids") is None:
                kwargs["prompt_block_ids"] = torch.zeros_like(input_ids)
        return super().generate(inputs, *args, **kwargs)

    def _check_context(self, length: int) -> None:
        context = getattr(self.config.text_config, "max_position_embeddings", None)
        if context is not None and length >= context:
            raise ValueError(
                f"the prompt has {length} tokens, the model's context is {context}: shorten the text, send fewer "
                f"images, or drop earlier turns (one image is {self.config.image_seq_length} tokens)."
            )

    def prepare_inputs_for_generation(
        self,
        input_ids: Any,
        pixel_values: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs,
    ) -> dict[str, Any]:
        if self._outgrown(kwargs.get("past_key_values"), input_ids.shape[1]):
            kwargs |= {"past_key_values": None, "next_sequence_length": None}
        inputs = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        prompt = inputs["input_ids"] if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
        length = prompt.shape[1]
        if inputs.get("prompt_block_ids") is not None:
            # What was generated since is answer.
            answered = max(input_ids.shape[1] - inputs["prompt_block_ids"].shape[1], 0)
            blocks = nn.functional.pad(inputs["prompt_block_ids"], (0, answered), value=-1)
            inputs["prompt_block_ids"] = blocks[:, -length:]
        if pixel_values is not None and (is_first_iteration or length > 1):
            inputs["pixel_values"] = self._images_from(input_ids, input_ids.shape[1] - length, pixel_values)
        if inputs.get("pixel_values") is not None:
            inputs["pixel_values"] = inputs["pixel_values"].to(prompt.device)
        return inputs

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

    def _images_from(self, input_ids: Tensor, start: int, pixel_values: Tensor) -> Tensor | None:
        """Of the prompt's images, those whose placeholders are at `start` or later: the others are in the cache."""
        if start == 0:
            return pixel_values
        is_image = input_ids == self.config.image_token_id
        images = is_image.sum(1) // self.config.image_seq_length
        if int(images.sum()) != pixel_values.shape[0]:
            return pixel_values
        cached = is_image[:, :start].sum(1) // self.config.image_seq_length
        keep = torch.cat([torch.arange(int(n)) >= int(c) for n, c in zip(images, cached, strict=True)])
        return pixel_values[keep.to(pixel_values.device)] if bool(keep.any()) else None

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **model_kwargs
    ):
        """Beams repeat rows; a row's images are several rows of pixel_values, which must stay together."""
        pixel_values = model_kwargs.pop("pixel_values", None)
        if pixel_values is not None and expand_size > 1 and input_ids is not None:
            counts = (input_ids == self.config.image_token_id).sum(1) // self.config.image_seq_length
            if int(counts.sum()) == pixel_values.shape[0]:
                rows = pixel_values.split(counts.tolist())
                pixel_values = torch.cat([row for row in rows for _ in range(expand_size)])
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        if pixel_values is not None:
            model_kwargs["pixel_values"] = pixel_values
        return input_ids, model_kwargs
