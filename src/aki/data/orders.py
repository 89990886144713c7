"""Orders of image and text: a property of the prompt's template (paper, section 5, dual-order training)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from aki.data.packing import PackedCollator, Row
from aki.data.schema import Sample
from aki.models.processing import AkiProcessor
from aki.models.templates import echo, text_first

ORDERS = {
    "image_first": ("image_first",),
    "text_first": ("text_first",),
    "echo": ("echo",),
    "both": ("image_first", "text_first"),
}
"""A stage's order -> the orders in which each sample is trained. `image_first` is the order in which data comes; `echo`
asks twice, before the picture and after it, so that a picture sees the question under a causal mask too."""
_TEMPLATES = {"text_first": text_first, "echo": echo}


def template_in_order(processor: AkiProcessor, name: str | None, order: str) -> str | None:
    """One of the processor's chat templates in an order: its name as it is (None is the default), or the template."""
    if order == "image_first":
        return name
    templates = processor.chat_template
    return _TEMPLATES[order](templates[name or "default"] if isinstance(templates, dict) else templates)


@dataclass
class InEachOrder:
    """Batches with every sample once in each order: all in the first, then all in the second.

    Attributes:
        collators: one an order.
        pad_token_id: shorter orders are padded on the right.
    """

    collators: Sequence[Callable[[Sequence[Sample]], Row]]
    pad_token_id: int

    def __call__(self, samples: Sequence[Sample]) -> Row:
        return PackedCollator(self.pad_token_id)([collate(samples) for collate in self.collators])
