"""The visibility rules: may the token at position q see the token at position k?

A rule is one short function of (layout, batch, query, key) in the style of a FlexAttention mask: the indices are
integer tensors of any shapes that broadcast, so the same lines give one entry, a row, or the whole mask. Documents and
padding are nobody's rule: `sees` applies them to all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import reduce

import torch
from torch import Tensor

from aki.attention.rectangles import Run, mma_rectangles, no_rectangles
from aki.layout import TEXT, SequenceLayout


def causal(layout: SequenceLayout, b: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Everything up to the token itself."""
    return k <= q


def mma(layout: SequenceLayout, b: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Modality-mutual attention (arXiv 2503.02597): causal, and media sees the other modalities of its prompt block."""
    q_modality, k_modality = layout.modality[b, q], layout.modality[b, k]
    q_block, k_block = layout.prompt_block[b, q], layout.prompt_block[b, k]
    mutual = (q_modality != TEXT) & (k_modality != q_modality) & (q_block == k_block) & (q_block >= 0)
    return causal(layout, b, q, k) | mutual


def mma_scoped(layout: SequenceLayout, b: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """As mma, but of what follows media sees only its own scope and those above it: its caption, not another's."""
    if layout.scope is None or layout.scope_end is None:
        return mma(layout, b, q, k)
    q_scope = layout.scope[b, q]
    holds = (layout.scope[b, k] <= q_scope) & (q_scope <= layout.scope_end[b, k])
    return causal(layout, b, q, k) | (mma(layout, b, q, k) & holds)


def concentric(layout: SequenceLayout, b: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Concentric causal attention (arXiv 2410.15926): within an item its own and outer rings; elsewhere causal."""
    ring, item = rings(layout), layout.media_item
    same = (item[b, q] == item[b, k]) & (item[b, q] >= 0)
    return torch.where(same, ring[b, k] <= ring[b, q], causal(layout, b, q, k))


def prefix(layout: SequenceLayout, b: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Causal, and each prompt block sees all of itself (PaliGemma's mask)."""
    q_block, k_block = layout.prompt_block[b, q], layout.prompt_block[b, k]
    return causal(layout, b, q, k) | ((q_block == k_block) & (q_block >= 0))


def image_bidirectional(layout: SequenceLayout, b: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Causal, and each media item sees all of itself (Gemma 3's mask)."""
    q_item, k_item = layout.media_item[b, q], layout.media_item[b, k]
    return causal(layout, b, q, k) | ((q_item == k_item) & (q_item >= 0))


def far_causal(layout: SequenceLayout) -> Tensor:
    return torch.arange(layout.shape[1], device=layout.document.device).expand(layout.shape)


def far_mma(layout: SequenceLayout) -> Tensor:
    """A media token sees as far as the last token of its block that is of another modality."""
    far = far_causal(layout)
    for modality in layout.modality.unique().tolist():
        if modality != TEXT:
            others = last_in_group(layout, layout.prompt_block, layout.modality != modality)
            far = torch.where(layout.modality == modality, torch.maximum(far, others), far)
    return far


def far_mma_scoped(layout: SequenceLayout) -> Tensor:
    """A media token sees as far as the last token of another modality in its block, in a scope that holds its own."""
    if layout.scope is None or layout.scope_end is None:
        return far_mma(layout)
    far = far_causal(layout)
    for modality in layout.modality.unique().tolist():
        if modality == TEXT:
            continue
        media = layout.modality == modality
        for scope in layout.scope[media].unique().tolist():
            holds = (layout.scope <= scope) & (scope <= layout.scope_end)
            others = last_in_group(layout, layout.prompt_block, ~media & holds)
            far = torch.where(media & (layout.scope == scope), torch.maximum(far, others), far)
    return far


def far_concentric(layout: SequenceLayout) -> Tensor:
    """A media token sees as far as the last token of its item that is not further in."""
    far, ring = far_causal(layout), rings(layout)
    for inner in range(int(ring.max()) + 1):
        far = torch.where(ring == inner, last_in_group(layout, layout.media_item, ring <= inner), far)
    return far


def far_prefix(layout: SequenceLayout) -> Tensor:
    everyone = torch.ones_like(layout.is_media)
    return torch.maximum(far_causal(layout), last_in_group(layout, layout.prompt_block, everyone))


def far_image_bidirectional(layout: SequenceLayout) -> Tensor:
    return torch.maximum(far_causal(layout), last_in_group(layout, layout.media_item, layout.is_media))


def rings(layout: SequenceLayout) -> Tensor:
    """(batch, length) int64, the layout's rings.

    Raises:
        ValueError: it has none.
    """
    if layout.ring is None:
        raise ValueError(
            "the rule 'concentric' needs to know on which ring of its picture each token stands, and this layout does "
            "not say: build it with `grids`, as AkiForConditionalGeneration.layout does."
        )
    return layout.ring


def ring_positions(layout: SequenceLayout) -> Tensor:
    """Position ids of concentric causal attention: (batch, length) int64, from 0 in each document.

    A media token has its item's start plus its ring, and what follows the item goes on at start plus number of rings.
    Padding takes no position. These are no positions by which documents can be told apart: they repeat.
    """
    ring, item = rings(layout), layout.media_item + 1
    count = item.new_zeros(item.shape[0], int(item.max()) + 1).scatter_reduce(1, item, ring + 1, "amax")
    is_last = torch.diff(item, append=item[:, -1:] * 0 - 1) != 0
    advance = torch.where(layout.is_media, count.gather(1, item) * is_last, 1).masked_fill(layout.is_padding, 0)
    start = advance.cumsum(1) - advance
    newest = layout.document.cummax(1).values
    begins = torch.diff(newest, prepend=newest[:, :1] * 0 - 1) != 0
    of_document = torch.where(begins, start, 0).cummax(1).values
    return start - of_document + ring.clamp(min=0)


def last_in_group(layout: SequenceLayout, group: Tensor, member: Tensor) -> Tensor:
    """For each token, the last position in its document and group where `member` holds; -1 where there is none.

    Args:
        group: (batch, length), -1 for padding and what belongs to no group.
        member: (batch, length) bool.
    """
    belongs = group >= 0
    row = torch.arange(group.shape[0], device=group.device)[:, None]
    name = (row * group.shape[1] + layout.document) * (group.max() + 1) + group
    names, index = name[belongs].unique(return_inverse=True)
    positions = far_causal(layout).masked_fill(~member, -1)[belongs]
    last = positions.new_full(names.shape, -1).scatter_reduce(0, index, positions, "amax")
    return torch.full_like(group, -1).masked_scatter(belongs, last[index])


@dataclass(frozen=True)
class Rule:
    """A named rule.

    Attributes:
        allows: (layout, b, q, k) -> bool, within one document.
        far: layout -> (batch, length), the last position that each token sees. What the leak guard needs.
        rectangles: layout -> what the rule adds to `causal`, as (queries, later keys). What merged attention needs;
            None where the rule is not causal plus rectangles.
        positions: layout -> (batch, length), where the rule also numbers the tokens in its own way. Such a rule needs
            the layout's rings.
        opens_text: whether it opens anything where there is no media.
    """

    name: str
    allows: Callable[[SequenceLayout, Tensor, Tensor, Tensor], Tensor]
    far: Callable[[SequenceLayout], Tensor]
    rectangles: Callable[[SequenceLayout], Iterator[tuple[Run, Run]]] | None = None
    positions: Callable[[SequenceLayout], Tensor] | None = None
    opens_text: bool = False

    def sees(self, layout: SequenceLayout, b: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """The rule within documents. Padding is never a key; as a query it keeps its row, whatever the document."""
        q_document, k_document = layout.document[b, q], layout.document[b, k]
        together = ((q_document == k_document) | (q_document < 0)) & (k_document >= 0)
        return self.allows(layout, b, q, k) & together


RULES = {
    "causal": Rule("causal", causal, far_causal, no_rectangles),
    "mma": Rule("mma", mma, far_mma, mma_rectangles),
    "mma_scoped": Rule("mma_scoped", mma_scoped, far_mma_scoped),
    "concentric": Rule("concentric", concentric, far_concentric, positions=ring_positions),
    "prefix": Rule("prefix", prefix, far_prefix, opens_text=True),
    "image_bidirectional": Rule("image_bidirectional", image_bidirectional, far_image_bidirectional),
}


def get_rule(name: str) -> Rule:
    """The rule of that name; `a+b` opens what either opens.

    Raises:
        ValueError: there is none.
    """
    parts = [_single(part) for part in name.split("+")]
    return parts[0] if len(parts) == 1 else union(parts)


def union(rules: Sequence[Rule]) -> Rule:
    """What any of the rules allows. Positions are those of the first that has its own."""

    def allows(layout: SequenceLayout, b: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return reduce(torch.logical_or, (rule.allows(layout, b, q, k) for rule in rules))

    def far(layout: SequenceLayout) -> Tensor:
        return reduce(torch.maximum, (rule.far(layout) for rule in rules))

    positions = next((rule.positions for rule in rules if rule.positions is not None), None)
    name = "+".join(rule.name for rule in rules)
    return Rule(name, allows, far, positions=positions, opens_text=any(rule.opens_text for rule in rules))


def _single(name: str) -> Rule:
    if name not in RULES:
        near = get_close_matches(name, RULES, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"there is no attention rule {name!r}; there are {', '.join(RULES)}.{hint}")
    return RULES[name]
