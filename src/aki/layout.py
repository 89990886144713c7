"""What each token of a batch is: the one description that every visibility rule reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

TEXT = 0
"""Modality of a text token. Media modalities are the positive integers (image is 1)."""
IMAGE = 1
VIDEO = 2
AUDIO = 3

SCOPE_TOKEN, END_SCOPE_TOKEN = "<|scope|>", "<|/scope|>"
"""What opens and closes a scope in text."""

IGNORE_INDEX = -100
"""Label of a token that is not learned, as in torch.nn.CrossEntropyLoss."""


@dataclass(frozen=True)
class SequenceLayout:
    """Integer tensors of shape (batch, length) that say what each token is.

    Attributes:
        document: 0, 1, ... for each document of a row; -1 is padding.
        modality: 0 for text, a positive number for each kind of media.
        media_item: 0, 1, ... for each item (a picture, a video, a clip) of a row; -1 is text.
        prompt_block: 0, 1, ... for each stretch of prompt between two answers; -1 is an answer, a caption or padding.
        scope: the innermost scope that a token stands in, numbered 1, 2, ... as they open in the row; 0 is none.
        scope_end: the last number of the scopes within that one: a scope t holds a scope s, itself or any below it,
            exactly if t <= s <= end of t. Both are None where the input marks no scopes.
        ring: of a media token, its square of the item's grid, the border is 0; -1 is text. None where no rule needs it.
    """

    document: Tensor
    modality: Tensor
    media_item: Tensor
    prompt_block: Tensor
    scope: Tensor | None = None
    scope_end: Tensor | None = None
    ring: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return self.document.shape

    def to(self, device: torch.device) -> SequenceLayout:
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: moved(tensor, device) for name, tensor in tensors.items() if tensor is not None})

    @property
    def is_padding(self) -> Tensor:
        return self.document < 0

    @property
    def is_media(self) -> Tensor:
        return self.modality != TEXT


def is_packed(position_ids: Tensor, layout: SequenceLayout | None) -> bool:
    """Whether rows hold several documents: positions (batch, length) restart, or the layout says so."""
    restarts = torch.diff(position_ids) != 1 if layout is None else layout.document > 0
    return bool(restarts.any())


def moved(x: Tensor, device: torch.device) -> Tensor:
    """On that device; from pinned memory to a GPU, so that the host does not wait for the copy."""
    if device.type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def build_layout(
    input_ids: Tensor,
    media_token_ids: Mapping[int, int],
    tokens_per_item: int | Mapping[int, int] | None,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    prompt_block_ids: Tensor | None = None,
    labels: Tensor | None = None,
    training: bool = False,
    scope_token_ids: Sequence[int] | None = None,
    grids: Mapping[int, tuple[int, int]] | None = None,
) -> SequenceLayout:
    """Describe a batch, once, from what the model is given.

    Args:
        input_ids: (batch, length), media placeholders already repeated once for every embedding.
        media_token_ids: modality -> id of its placeholder.
        tokens_per_item: how many placeholders one item has, or modality -> how many; None: each run of placeholders
            is one.
        attention_mask: (batch, length), 0 is padding. Absent: no padding.
        position_ids: (batch, length); where it restarts (and there is no attention_mask), a new packed document begins,
            which is how transformers reads it.
        prompt_block_ids: (batch, length), -1 for answers and padding. Absent: see `labels`.
        labels: (batch, length). Where prompt_block_ids are absent, each maximal run of -100 within a document is a
            block. Labels on media tokens count as -100.
        training: without prompt_block_ids and labels, everything is one block, which in training would be a leak.
        scope_token_ids: the tokens that open and close a scope, which both belong to it.
        grids: modality -> rows and columns of an item's tokens, which are counted row by row. Absent: no rings.

    Raises:
        ValueError: neither prompt_block_ids nor labels in training, or of another shape than input_ids.
    """
    for name, given in (("prompt_block_ids", prompt_block_ids), ("labels", labels)):
        if given is not None and given.shape != input_ids.shape:
            raise ValueError(
                f"{name} have the shape {tuple(given.shape)}, input_ids {tuple(input_ids.shape)}: give one for each "
                "token, placeholders and padding included."
            )
    document = _documents(input_ids, attention_mask, position_ids)
    modality = torch.zeros_like(input_ids)
    for kind, token_id in media_token_ids.items():
        modality = modality.masked_fill(input_ids == token_id, kind)
    is_media = modality != TEXT
    if tokens_per_item is None:
        media_item = number_runs(is_media, torch.diff(modality, prepend=modality[:, :1]) != 0)
    else:
        per_item = (
            dict.fromkeys(media_token_ids, tokens_per_item) if isinstance(tokens_per_item, int) else tokens_per_item
        )
        media_item = _count_items(modality, per_item)
    if prompt_block_ids is None:
        prompt_block_ids = _blocks_from_labels(document, is_media, labels, training)
    scope, scope_end = (None, None) if scope_token_ids is None else _scopes(input_ids, *scope_token_ids)
    prompt_block = prompt_block_ids.masked_fill(document < 0, -1)
    ring = None if grids is None else _rings(modality, grids)
    return SequenceLayout(document, modality, media_item, prompt_block, scope, scope_end, ring)


def grid_rings(height: int, width: int) -> Tensor:
    """The concentric squares of a grid from the border in: (height * width,) int64, row by row; the border is 0.

    As in concentric causal attention (arXiv 2410.15926); on an oblong grid the squares are oblong too.
    """
    row, column = torch.arange(height)[:, None], torch.arange(width)
    upper, left = torch.minimum(row, height - 1 - row), torch.minimum(column, width - 1 - column)
    return torch.minimum(upper, left).flatten()


def number_runs(inside: Tensor, breaks: Tensor | None = None) -> Tensor:
    """Number the maximal runs of True in each row 0, 1, ...; -1 elsewhere. A True in `breaks` also starts a new run.

    Args:
        inside: (batch, length) bool.
        breaks: (batch, length) bool.
    """
    previous = nn.functional.pad(inside, (1, 0))[:, :-1]
    starts = inside & ~previous if breaks is None else inside & (~previous | breaks)
    return (starts.long().cumsum(1) - 1).masked_fill(~inside, -1)


def _count_items(modality: Tensor, tokens_per_item: Mapping[int, int]) -> Tensor:
    starts = torch.zeros_like(modality)
    for kind, tokens in tokens_per_item.items():
        own = modality == kind
        starts += own & ((own.cumsum(1) - 1) % tokens == 0)
    return (starts.cumsum(1) - 1).masked_fill(modality == TEXT, -1)


def _rings(modality: Tensor, grids: Mapping[int, tuple[int, int]]) -> Tensor:
    rings = torch.full_like(modality, -1)
    for kind, (height, width) in grids.items():
        own = modality == kind
        of_item = grid_rings(height, width).to(modality.device)
        rings = torch.where(own, of_item[(own.cumsum(1) - 1) % (height * width)], rings)
    return rings


def _scopes(input_ids: Tensor, open_id: int, close_id: int) -> tuple[Tensor, Tensor]:
    """For each token its innermost scope, and the last of the scopes within that one; (batch, length) both.

    A scope that is never closed goes on to the end of the row; what closes none is a token like any other.
    """
    opens, closes = (input_ids == open_id).long(), (input_ids == close_id).long()
    number = opens.cumsum(1)
    before = nn.functional.pad((opens - closes).cumsum(1), (1, 0))[:, :-1]
    # A close without an open takes the balance below zero: what is zero starts again from there.
    depth = before - before.cummin(1).values.clamp(max=0) + opens
    scope, end = torch.zeros_like(number), number[:, -1:].expand_as(number).clone()
    for level in range(1, int(depth.max()) + 1):
        here = depth == level
        innermost = (number * opens * here).cummax(1).values
        # The first scope that opens after this one is over, and not within it.
        next_opened = torch.where(opens.bool() & (depth <= level), number, number[:, -1:] + 1)
        after = nn.functional.pad(next_opened[:, 1:].flip(1).cummin(1).values.flip(1), (0, 1))
        after[:, -1:] = number[:, -1:] + 1
        scope, end = torch.where(here, innermost, scope), torch.where(here, after - 1, end)
    return scope, end


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
                "in training a rule needs to know where the prompt ends: pass `prompt_block_ids` (AKI's processor "
                "writes them, for other models aki.write_prompt_blocks) or `labels`."
            )
        return torch.zeros_like(document)
    is_prompt = ((labels == IGNORE_INDEX) | is_media) & (document >= 0)
    new_document = torch.diff(document, prepend=document[:, :1]) != 0
    return number_runs(is_prompt, new_document)
