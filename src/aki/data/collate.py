"""Samples to batches, through the processor that inference uses too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from aki.attention.prompts import PromptBlockWriter
from aki.data.schema import Sample
from aki.models.processing import AkiProcessor, labels_from_prompt_blocks


@dataclass
class ChatCollator:
    """Turns samples into model inputs with labels on the answers, padded on the right.

    Attributes:
        processor: AKI's, or another model's in `aki.write_prompt_blocks`.
        template: name of the processor's chat template; None is its default.
        max_length: tokens a sample may have.
    """

    processor: AkiProcessor | PromptBlockWriter
    max_length: int
    template: str | None = None

    def __call__(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        """
        Raises:
            ValueError: a sample is longer than max_length.
        """
        batch = self.processor.apply_chat_template(
            [sample.messages for sample in samples],
            chat_template=self.template,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "right", "add_special_tokens": False},
        )
        lengths = batch["attention_mask"].sum(1)
        if int(lengths.max()) > self.max_length:
            worst = int(lengths.argmax())
            raise ValueError(
                f"sample {samples[worst].source}/{samples[worst].id} has {int(lengths[worst])} tokens, more than the "
                f"{self.max_length} that are allowed: raise max_length or shorten the sample."
            )
        batch["labels"] = labels_from_prompt_blocks(
            batch["input_ids"], batch["attention_mask"], batch["prompt_block_ids"], *self.processor.media_token_ids
        )
        return dict(batch)
