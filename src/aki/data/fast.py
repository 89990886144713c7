"""Training's own way to model inputs: what the processor computes for one chat, without what it repeats for each.

The pictures are resized and normalised in one pass, and the text is tokenised before an image's one token becomes its
placeholders. Tests hold it equal to the processor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.utils.chat_template_utils import render_jinja_template

from aki.layout import moved
from aki.models.answers import of_this_thread, prompt_blocks, tokens_in
from aki.models.processing import AkiProcessor

_STEPS = ("do_convert_rgb", "do_resize", "do_rescale", "do_normalize")
_OTHER_STEPS = ("do_center_crop", "do_pad")


class NoFastWay(ValueError):
    """A processor does something that the fast way doesn't."""


class FastPixels:
    """What an image processor makes of a picture that it resizes to a fixed size, rescales and normalises.

    Rescaling and normalising become one multiplication and one subtraction, which can wait until the bytes are where
    the model is: within 1e-6 of the image processor.

    Raises:
        NoFastWay: it does something else.
    """

    def __init__(self, processor: Any):
        extra = [step for step in _OTHER_STEPS if getattr(processor, step, None)]
        missing = [step for step in _STEPS if not getattr(processor, step, None)]
        if extra or missing or set(dict(processor.size)) != {"height", "width"}:
            raise NoFastWay(f"{type(processor).__name__} does not just resize to a size, rescale and normalise.")
        self.size = (processor.size["width"], processor.size["height"])
        self.resample = Image.Resampling(int(processor.resample))
        mean = torch.tensor(processor.image_mean, dtype=torch.float64)
        std = torch.tensor(processor.image_std, dtype=torch.float64)
        self.scale = (processor.rescale_factor / std).float()[:, None, None]
        self.shift = (mean / std).float()[:, None, None]

    def __call__(self, pictures: Sequence[Image.Image]) -> Tensor:
        """(pictures, 3, height, width) uint8 of RGB pictures, resized."""
        resized = [one if one.size == self.size else one.resize(self.size, self.resample) for one in pictures]
        # As Pillow lays them out: putting the channels first is the model's device's work too.
        return torch.from_numpy(np.stack([np.asarray(one) for one in resized])).permute(0, 3, 1, 2)

    def normalise(self, pixels: Tensor) -> Tensor:
        """`pixel_values` of those bytes: the same shape and device, float32."""
        values = pixels.to(torch.float32, memory_format=torch.contiguous_format)
        return values.mul_(moved(self.scale, pixels.device)).sub_(moved(self.shift, pixels.device))


class FastInputs:
    """`AkiProcessor.apply_chat_template` of one chat of texts and opened pictures, for training.

    Args:
        template: the name of the chat template, or the template itself; None is the default.

    Raises:
        NoFastWay: as `FastPixels`.
    """

    def __init__(self, processor: AkiProcessor, template: str | None):
        self.pixels = FastPixels(processor.image_processor)
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.template = processor.template(template)

    def __call__(self, messages: list[dict[str, Any]], raw_pixels: bool = False) -> dict[str, Tensor]:
        """
        Args:
            raw_pixels: leave the pictures as bytes, for `FastPixels.normalise`.

        Returns:
            input_ids, attention_mask and prompt_block_ids, (1, tokens) int64, and, where there are pictures,
            pixel_values, (pictures, 3, height, width) float32 or uint8.
        """
        texts, spans = render_jinja_template(
            [messages],
            chat_template=of_this_thread(self.template),
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        encoded = self.tokenizer.backend_tokenizer.encode(texts[0], add_special_tokens=False)
        answers = tokens_in(encoded.offsets, spans[0])
        blocks = prompt_blocks(encoded.ids, [1] * len(encoded), answers, self.processor.answer_token_id)
        image = self.processor.image_token_id
        tokens: tuple[list[int], list[int]] = ([], [])
        for token, block in zip(encoded.ids, blocks, strict=True):
            repeats = self.processor.image_seq_length if token == image else 1
            tokens[0].extend([token] * repeats)
            tokens[1].extend([block] * repeats)
        input_ids, prompt_block_ids = torch.tensor(tokens)[:, None]
        inputs = {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "prompt_block_ids": prompt_block_ids,
        }
        pictures = [part["image"] for message in messages for part in message["content"] if part["type"] == "image"]
        if pictures:
            pixels = self.pixels(pictures)
            inputs["pixel_values"] = pixels if raw_pixels else self.pixels.normalise(pixels)
        return inputs


def fast_inputs(processor: Any, template: str | None) -> FastInputs | None:
    """The fast way of a processor, or None where it has none."""
    if not isinstance(processor, AkiProcessor):
        return None
    try:
        return FastInputs(processor, template)
    except NoFastWay:
        return None
