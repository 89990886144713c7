"""The visibility rules: may the token at position q see the token at position k?

A rule is one short function of (layout, batch, query, key) in the style of a FlexAttention mask: the indices are
integer tensors of any shapes that broadcast, so the same lines give one entry, a row, or the whole mask. Documents and
padding are nobody's rule: `sees` applies them to all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches

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
    """

    name: str
    allows: Callable[[SequenceLayout, Tensor, Tensor, Tensor], Tensor]
    far: Callable[[SequenceLayout], Tensor]
    rectangles: Callable[[SequenceLayout], Iterator[tuple[Run, Run]]] | None = None

    def sees(self, layout: SequenceLayout, b: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """The rule within documents. Padding is never a key; as a query it keeps its row, whatever the document."""
        q_document, k_document = layout.document[b, q], layout.document[b, k]
        together = ((q_document == k_document) | (q_document < 0)) & (k_document >= 0)
        return self.allows(layout, b, q, k) & together


RULES = {
    "causal": Rule("causal", causal, far_causal, no_rectangles),
    "mma": Rule("mma", mma, far_mma, mma_rectangles),
    "mma_scoped": Rule("mma_scoped", mma_scoped, far_mma_scoped),
}


def get_rule(name: str) -> Rule:
    """The rule of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in RULES:
        near = get_close_matches(name, RULES, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"there is no attention rule {name!r}; there are {', '.join(RULES)}.{hint}")
    return RULES[name]
