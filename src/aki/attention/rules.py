"""The visibility rules: may the token at position q see the token at position k?

A rule is one short function of (layout, batch, query, key) in the style of a FlexAttention mask: the indices are
integer tensors of any shapes that broadcast, so the same lines give one entry, a row, or the whole mask. Documents and
padding are nobody's rule: `Rule.sees` applies them to all. What it takes to compute a rule and to guard it follows from
this function alone (`aki.attention.segments`), where two tokens alike in all of the layout differ by `k <= q` only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache, reduce

import torch
from torch import Tensor

from aki.layout import TEXT, SequenceLayout

Allows = Callable[[SequenceLayout, Tensor, Tensor, Tensor], Tensor]


def causal(layout: SequenceLayout, b: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Everything up to the token itself."""
    return k <= q


def mma(layout: SequenceLayout, b: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Modality-mutual attention (arXiv 2503.02597): causal, and media sees the other modalities of its prompt block."""
    modality, block = layout.modality, layout.prompt_block
    mutual = (modality[b, q] != TEXT) & (modality[b, k] != modality[b, q])
    return (k <= q) | (mutual & _same(block, b, q, k))


def mma_scoped(layout: SequenceLayout, b: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """As mma, but of what follows media sees only its own scope and those above it: its caption, not another's."""
    if layout.scope is None or layout.scope_end is None:
        return mma(layout, b, q, k)
    q_scope = layout.scope[b, q]
    holds = (layout.scope[b, k] <= q_scope) & (q_scope <= layout.scope_end[b, k])
    return (k <= q) | (mma(layout, b, q, k) & holds)


def concentric(layout: SequenceLayout, b: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Concentric causal attention (arXiv 2410.15926): within an item its own and outer rings; elsewhere causal."""
    ring = rings(layout)
    return torch.where(_same(layout.media_item, b, q, k), ring[b, k] <= ring[b, q], k <= q)


def prefix(layout: SequenceLayout, b: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Causal, and each prompt block sees all of itself (PaliGemma's mask)."""
    return (k <= q) | _same(layout.prompt_block, b, q, k)


def image_bidirectional(layout: SequenceLayout, b: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Causal, and each media item sees all of itself (Gemma 3's mask)."""
    return (k <= q) | _same(layout.media_item, b, q, k)


def _same(group: Tensor, b: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Whether both are of one group; -1 is none."""
    return (group[b, q] == group[b, k]) & (group[b, q] >= 0)


@dataclass(frozen=True)
class Rule:
    """A named rule.

    Attributes:
        allows: (layout, b, q, k) -> bool, within one document.
        positions: layout -> (batch, length), where the rule also numbers the tokens in its own way. Such a rule needs
            the layout's rings.
    """

    name: str
    allows: Allows
    positions: Callable[[SequenceLayout], Tensor] | None = None

    def sees(self, layout: SequenceLayout, b: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """The rule within documents. Padding is never a key; as a query it is causal, whatever the document."""
        q_document, k_document = layout.document[b, q], layout.document[b, k]
        ruled = self.allows(layout, b, q, k) & (q_document == k_document)
        return torch.where(q_document < 0, k <= q, ruled) & (k_document >= 0)

    @property
    def changes_text(self) -> bool:
        """Whether it is more, or less, than causal attention where there is no media: on two turns of text."""
        return _changes_text(self)


@cache
def _changes_text(rule: Rule) -> bool:
    block = torch.tensor([[0, 0, -1, -1, 1, 1]], device="cpu")
    text, none = torch.zeros_like(block), torch.full_like(block, -1)
    token = torch.arange(6, device="cpu")
    q, k = token[:, None], token
    allowed = rule.allows(SequenceLayout(text, text, none, block, ring=none), torch.zeros_like(q), q, k)
    return not torch.equal(allowed, k <= q)


@torch.compiler.assume_constant_result
def get_rule(name: str) -> Rule:
    """The rule of that name; `a+b` opens what either opens, and numbers the tokens as the first that does.

    Raises:
        ValueError: there is none, or none that runs of tokens are enough for.
    """
    return _union(tuple(_single(part) for part in name.split("+")))


@cache
def _union(parts: tuple[Rule, ...]) -> Rule:
    rule = parts[0]
    if len(parts) > 1:
        positions = next((part.positions for part in parts if part.positions is not None), None)
        name = "+".join(part.name for part in parts)
        rule = Rule(name, lambda *at: reduce(torch.logical_or, (part.allows(*at) for part in parts)), positions)
    with torch.device("cpu"):
        _check_runs(rule)
    return rule


def _check_runs(rule: Rule) -> None:
    """On long runs of many kinds: do tokens that are alike in all of the layout differ by `k <= q` alone?

    Raises:
        ValueError: they do not.
    """
    modality, block, scope = torch.cartesian_prod(torch.arange(3), torch.arange(-1, 2), torch.arange(3)).T
    run = torch.arange(len(modality))
    item, ring = (torch.where(modality != TEXT, number, -1) for number in (run // 2, run % 2))
    columns = torch.stack([run * 0, modality, item, block, scope, run * 0 + 2, ring])
    layout = SequenceLayout(*columns[:, None].repeat_interleave(_RUN, -1))
    first, last = run * _RUN, (run + 1) * _RUN - 1

    def at(q: Tensor, k: Tensor) -> Tensor:
        return rule.allows(layout, torch.zeros_like(q)[:, None], q[:, None], k)

    seen = at(first, last)
    behind = seen | (run[:, None] == run)
    corners = ((first, first), (last, first), (last, last))
    if not torch.equal(at(first, first + 1), seen) or any(not torch.equal(at(q, k), behind) for q, k in corners):
        raise ValueError(
            f"runs are not enough for the rule {rule.name!r}: tokens that are alike in all of the layout differ by "
            "more than `k <= q`, by how far they are from each other for instance. Give the layout a field "
            "(aki/layout.py) that says what the rule reads."
        )


_RUN = 4096


def _single(name: str) -> Rule:
    if name not in RULES:
        near = get_close_matches(name, RULES, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else " Your own comes with --plugin FILE."
        raise ValueError(f"there is no attention rule {name!r}; there are {', '.join(RULES)}.{hint}")
    return RULES[name]


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


RULES = {
    rule.name: rule
    for rule in (
        Rule("causal", causal),
        Rule("mma", mma),
        Rule("mma_scoped", mma_scoped),
        Rule("concentric", concentric, ring_positions),
        Rule("prefix", prefix),
        Rule("image_bidirectional", image_bidirectional),
    )
}
