"""What each token of a batch is: the one description that every visibility rule reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

TEXT = 0
"""Modality of a text token. Media modalities are the positive integers (image is 1)."""
IMAGE = 1
VIDEO = 2
AUDIO = 3

IGNORE_INDEX = -100
"""Label of a token that is not learned, as in torch.nn.CrossEntropyLoss."""


@dataclass(frozen=True)
class SequenceLayout:
    """Four integer tensors of shape (batch, length) that say what each token is.

    Attributes:
        document: 0, 1, ... for each document of a row; -1 is padding.
        modality: 0 for text, a positive number for each kind of media.
        media_item: 0, 1, ... for each picture of a row; -1 is text.
        prompt_block: 0, 1, ... for each stretch of prompt between two answers; -1 is an answer, a caption or padding.
    """

    document: Tensor
    modality: Tensor
    media_item: Tensor
    prompt_block: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.document.shape

    def to(self, device: torch.device) -> SequenceLayout:
        return SequenceLayout(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})

    @property
    def is_padding(self) -> Tensor:
        return self.document < 0

    @property
    def is_media(self) -> Tensor:
        return self.modality != TEXT


def build_layout(
    input_ids: Tensor,
    media_token_ids: Mapping[int, int],
    tokens_per_item: int | None,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    prompt_block_ids: Tensor | None = None,
    labels: Tensor | None = None,
    training: bool = False,
) -> SequenceLayout:
    """Describe a batch, once, from what the model is given.

    Args:
        input_ids: (batch, length), media placeholders already repeated once for every embedding.
        media_token_ids: modality -> id of its placeholder.
        tokens_per_item: how many placeholders one picture has; None: each run of placeholders is one.
        attention_mask: (batch, length), 0 is padding. Absent: no padding.
        position_ids: (batch, length); where it restarts (and there is no attention_mask), a new packed document begins,
            which is how transformers reads it.
        prompt_block_ids: (batch, length), -1 for answers and padding. Absent: see `labels`.
        labels: (batch, length). Where prompt_block_ids are absent, each maximal run of -100 within a document is a
            block. Labels on media tokens count as -100.
        training: without prompt_block_ids and labels, everything is one block, which in training would be a leak.

    Raises:
        ValueError: neither prompt_block_ids nor labels in training.
    """
    document = _documents(input_ids, attention_mask, position_ids)
    modality = torch.zeros_like(input_ids)
    for kind, token_id in media_token_ids.items():
        modality = modality.masked_fill(input_ids == token_id, kind)
    is_media = modality != TEXT
    if tokens_per_item is None:
        media_item = number_runs(is_media, torch.diff(modality, prepend=modality[:, :1]) != 0)
    else:
        media_item = ((is_media.cumsum(1) - 1) // tokens_per_item).masked_fill(~is_media, -1)
    if prompt_block_ids is None:
        prompt_block_ids = _blocks_from_labels(document, is_media, labels, training)
    return SequenceLayout(document, modality, media_item, prompt_block_ids.masked_fill(document < 0, -1))


def number_runs(inside: Tensor, breaks: Tensor | None = None) -> Tensor:
    """Number the maximal runs of True in each row 0, 1, ...; -1 elsewhere. A True in `breaks` also starts a new run.

    Args:
        inside: (batch, length) bool.
        breaks: (batch, length) bool.
    """
    previous = torch.nn.functional.pad(inside, (1, 0))[:, :-1]
    starts = inside & ~previous if breaks is None else inside & (~previous | breaks)
    return (starts.long().cumsum(1) - 1).masked_fill(~inside, -1)


def _documents(input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> Tensor:
    if attention_mask is not None:
        return attention_mask.long().clamp(max=1) - 1
    if position_ids is None:
        return torch.zeros_like(input_ids)
    steps = torch.diff(position_ids, prepend=position_ids[:, :1] - 1)
    return (steps != 1).long().cumsum(1).expand_as(input_ids)


def _blocks_from_labels(document: Tensor, is_media: Tensor, labels: Tensor | None, training: bool) -> Tensor:
    if labels is None:
        if training:
            raise ValueError(
                "in training a rule needs to know where the prompt ends: pass `prompt_block_ids` "
                "(the processor's apply_chat_template writes them) or `labels`."
            )
        return torch.zeros_like(document)
    is_prompt = ((labels == IGNORE_INDEX) | is_media) & (document >= 0)
    new_document = torch.diff(document, prepend=document[:, :1]) != 0
    return number_runs(is_prompt, new_document)
