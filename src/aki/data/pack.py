"""Packed rows for any model: whole samples, joined behind any collator."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from aki.attention.families import CannotUnlock, makes_own_masks
from aki.data.packing import first_fit_decreasing
from aki.layout import IGNORE_INDEX
from aki.models.other import base_of

Inputs = dict[str, Tensor]
RopeIndex = Callable[..., tuple[Tensor, Tensor]]

_FILL = {"labels": IGNORE_INDEX, "prompt_block_ids": -1}
"""What stands in the rest of a row; zero for every other input."""


def pack(collator: Callable[[Any], Mapping[str, Tensor]], model: nn.Module, row_tokens: int) -> Packed:
    """A collator that fills rows of up to `row_tokens` tokens with whole samples, instead of a padded row a sample.

    Documents are kept apart by positions that restart, as transformers and aki.unlock read them; a family with
    multimodal rotary positions gets each document's own, from the model's own function. The number of rows varies.

        trainer.data_collator = aki.pack(aki.write_prompt_blocks(trainer.data_collator), model, row_tokens=4096)

    Args:
        collator: makes a batch of a list of samples, with labels.
        model: AKI's own, an unlocked model, or one that is trained causally.

    Raises:
        CannotUnlock: this family cannot be packed, and why.
    """
    return Packed(collator, rope_index_of(model), row_tokens)


def rope_index_of(model: nn.Module) -> RopeIndex | None:
    """The model's own function from input_ids and what they show to multimodal rotary positions, if it has any.

    Raises:
        CannotUnlock: this family cannot be packed, and why.
    """
    whole = base_of(model)
    kind = type(whole).__name__
    if makes_own_masks(whole):
        raise CannotUnlock(
            f"{kind} makes masks of its own from what is media, and does not keep packed documents apart in them: "
            "train it on padded rows."
        )
    return next((part.get_rope_index for part in whole.modules() if hasattr(part, "get_rope_index")), None)


def position_axes(rope_index: RopeIndex, inputs: Inputs) -> Tensor:
    """Multimodal rotary positions of one document without padding, (3, 1, tokens)."""
    ids = inputs["input_ids"]
    known = inspect.signature(rope_index).parameters
    asked = {name: value for name, value in inputs.items() if name in known and name != "position_ids"}
    asked |= {"attention_mask": torch.ones_like(ids)} if "attention_mask" in known else {}
    if "audio_seqlens" in known and "feature_attention_mask" in inputs:
        asked["audio_seqlens"] = inputs["feature_attention_mask"].sum(-1)  # as Qwen-Omni's forward
    return rope_index(**asked)[0].to(ids)


@dataclass
class Packed:
    """As `pack` makes it.

    Attributes:
        rope_index: the model's own function from input_ids and what they show to multimodal rotary positions, if any.
    """

    collator: Callable[[Any], Mapping[str, Tensor]]
    rope_index: RopeIndex | None
    row_tokens: int

    def __call__(self, samples: Sequence[Any]) -> Inputs:
        """
        Returns:
            the collator's inputs without attention_mask, (rows, tokens); position_ids (rows, tokens), or
            (4, rows, tokens), of which the first are the text's. They restart with each document.

        Raises:
            ValueError: a sample is longer than a row.
        """
        documents = [self._document(self.collator([sample])) for sample in samples]
        bins = first_fit_decreasing([one["input_ids"].shape[1] for one in documents], self.row_tokens)
        rows = [_joined([documents[number] for number in chosen]) for chosen in bins]
        longest = max(row["input_ids"].shape[1] for row in rows)
        by_token = {name for row in rows for name, value in row.items() if _is_by_token(name, value, row)}
        tokens = {name: torch.cat([_filled(name, row[name], longest) for row in rows], -2) for name in sorted(by_token)}
        # In the order of the rows, as their placeholders stand.
        ordered = [documents[number] for chosen in bins for number in chosen]
        return tokens | _media(ordered, by_token)

    def _document(self, batch: Mapping[str, Tensor]) -> Inputs:
        """A sample without padding, with positions of its own, of which nothing predicts the first token."""
        inputs = dict(batch)
        real = inputs.pop("attention_mask", torch.ones_like(inputs["input_ids"]))[0].bool()
        inputs = {
            name: value[..., real] if value.shape == batch["input_ids"].shape else value
            for name, value in inputs.items()
        }
        ids = inputs["input_ids"]
        if "labels" in inputs:
            inputs["labels"] = inputs["labels"].clone()
            inputs["labels"][:, 0] = IGNORE_INDEX
        inputs["position_ids"] = torch.arange(ids.shape[1])[None]
        if self.rope_index is not None:
            axes = position_axes(self.rope_index, inputs)
            inputs["position_ids"] = torch.cat([inputs["position_ids"][None], axes])
        return inputs


def _is_by_token(name: str, value: Tensor, row: Inputs) -> bool:
    return name == "position_ids" or value.shape == row["input_ids"].shape


def _joined(documents: Sequence[Inputs]) -> Inputs:
    """The inputs that have a value a token, documents one behind the other."""
    names = [name for name, value in documents[0].items() if _is_by_token(name, value, documents[0])]
    return {name: torch.cat([document[name] for document in documents], -1) for name in names}


def _filled(name: str, value: Tensor, longest: int) -> Tensor:
    """What is left of a row is one more document, of which nothing is learned."""
    missing = longest - value.shape[-1]
    if name == "position_ids":
        rest = torch.arange(missing).expand(*value.shape[:-1], missing)
        return torch.cat([value, rest.to(value)], -1)
    return nn.functional.pad(value, (0, missing), value=_FILL.get(name, 0))


def _media(documents: Sequence[Inputs], by_token: set[str]) -> Inputs:
    """The items of all documents in order, padded with zeros where their shapes differ."""
    names = dict.fromkeys(name for document in documents for name in document if name not in by_token)
    found = {}
    for name in names:
        values = [document[name] for document in documents if name in document]
        shape = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
        padded = []
        for value in values:
            missing = [room - size for room, size in zip(shape, value.shape[1:], strict=True)]
            padded.append(nn.functional.pad(value, [edge for one in reversed(missing) for edge in (0, one)]))
        found[name] = torch.cat(padded)
    return found
