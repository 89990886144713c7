"""From a rule to the attention calls that compute it: which queries see which keys, and whether causally.

Causal attention does not care about the order of its keys: positions are in the rotary embedding. So whatever a token
sees besides its own past can be put before that past, and a causal kernel whose mask is aligned to the bottom right,
which lets query i of n see the first K - n + i + 1 of K keys, computes both at once. Such a call is a segment.

Segments follow from the rule's own function. A row is cut into runs, maximal stretches of tokens alike in all that a
rule may read. Two tokens of one run differ by `k <= q` alone, so the rule at the first tokens of two runs holds for all
of both, and at (first, last) of one run it says whether the run sees all of itself or is causal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import fields
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn

from aki.attention.rules import Rule, get_rule
from aki.layout import SequenceLayout


class Span(NamedTuple):
    """The tokens `start` to `stop - 1` of a row."""

    start: int
    stop: int


class Segment(NamedTuple):
    """Queries of one row that one attention call computes.

    Attributes:
        document: the document that they belong to; -1 for padding that stands before other tokens.
        queries: their spans, ascending.
        keys: what they see, in the order in which the kernel is to be given it; of a causal segment the queries
            themselves come last. Never empty.
        is_causal: query i of n sees the first K - n + i + 1 of K keys; else every query sees all of them.
    """

    row: int
    document: int
    queries: tuple[Span, ...]
    keys: tuple[Span, ...]
    is_causal: bool


class _Grid(NamedTuple):
    """The runs of a batch in order, padding left out, and what a rule says of each pair of them within a document.

    Attributes:
        row, document, start, stop: (runs,) int64.
        size: (runs,) int64, how many runs the run's document has.
        query, key: (pairs,) int64, the numbers of two runs of one document; ordered by query, then key.
        seen: (pairs,) bool, whether the query sees the key; of a run and itself, whether its first token sees its last.
    """

    row: Tensor
    document: Tensor
    start: Tensor
    stop: Tensor
    size: Tensor
    query: Tensor
    key: Tensor
    seen: Tensor


def segments(rule: Rule | str, layout: SequenceLayout) -> list[Segment]:
    """The calls that compute a rule, by row and first query; no query is in two of them.

    Padding is in them only where other tokens follow it, with its causal row: a loss may ask it for the token after it.

    Args:
        rule: a rule, or its name.
        layout: documents of a row one behind the other; on any device, the work is done on the CPU.
    """
    layout = layout.to(torch.device("cpu"))
    grid = _grid(get_rule(rule) if isinstance(rule, str) else rule, layout)
    spans = [Span(*edges) for edges in zip(grid.start.tolist(), grid.stop.tolist(), strict=True)]
    found = list(_of_padding(layout))
    sizes, places, seen = grid.size.tolist(), list(zip(grid.row.tolist(), grid.document.tolist(), strict=True)), 0
    first = 0
    while first < len(spans):
        size = sizes[first]
        square = grid.seen[seen : seen + size * size].view(size, size).numpy()
        found += _of_document(*places[first], spans[first : first + size], square)
        first, seen = first + size, seen + size * size
    return sorted(found, key=lambda segment: (segment.row, segment.queries))


def far(rule: Rule, layout: SequenceLayout) -> Tensor:
    """(batch, length) int64: the last position that each token sees; padding's own. Linear in the batch."""
    device, layout = layout.document.device, layout.to(torch.device("cpu"))
    grid = _grid(rule, layout)
    last = torch.where(grid.seen, grid.stop[grid.key] - 1, -1)
    of_run = last.new_zeros(grid.row.shape).scatter_reduce(0, grid.query, last, "amax")
    position = torch.arange(layout.shape[1], device="cpu").expand(layout.shape)
    of_token = torch.zeros_like(position).masked_scatter(
        ~layout.is_padding, of_run.repeat_interleave(grid.stop - grid.start)
    )
    return torch.maximum(position, of_token).to(device)


def allowed_pairs(found: Iterable[Segment]) -> int:
    """How many (query, key) pairs the segments compute."""
    total = 0
    for segment in found:
        queries, keys = length(segment.queries), length(segment.keys)
        total += queries * (keys - queries) + queries * (queries + 1) // 2 if segment.is_causal else queries * keys
    return total


def length(spans: Iterable[Span]) -> int:
    return sum(stop - start for start, stop in spans)


def joined(spans: Iterable[Span]) -> tuple[Span, ...]:
    """The same tokens in the same order, in as few spans as there can be."""
    found: list[Span] = []
    for start, stop in spans:
        if found and found[-1].stop == start:
            found[-1] = Span(found[-1].start, stop)
        else:
            found.append(Span(start, stop))
    return tuple(found)


def _grid(rule: Rule, layout: SequenceLayout) -> _Grid:
    document = layout.document
    begins = torch.zeros_like(document, dtype=torch.bool)
    begins[:, :1] = True
    for field in fields(layout):
        values = getattr(layout, field.name)
        if values is not None:
            begins[:, 1:] |= values[:, 1:] != values[:, :-1]
    row, start = begins.nonzero().unbind(1)
    stop = torch.cat([start[1:], start[:1]])
    stop = torch.where(stop > start, stop, document.shape[1])
    real = document[row, start] >= 0
    row, start, stop = row[real], start[real], stop[real]
    own = document[row, start]
    new = torch.ones_like(own, dtype=torch.bool)
    new[1:] = (row[1:] != row[:-1]) | (own[1:] != own[:-1])
    group = new.cumsum(0) - 1
    size = group.bincount()[group]
    query = torch.arange(len(own), device="cpu").repeat_interleave(size)
    key = (new.nonzero()[:, 0][group] + size - size.cumsum(0))[query] + torch.arange(len(query), device="cpu")
    other = torch.where(query == key, stop[key] - 1, start[key])
    return _Grid(row, own, start, stop, size, query, key, rule.allows(layout, row[query], start[query], other))


def _of_document(row: int, document: int, spans: list[Span], seen: np.ndarray) -> Iterator[Segment]:
    """Runs that continue each other causally are one segment, runs that see the same keys are one.

    Args:
        seen: (runs, runs) bool, as in `_Grid`.
    """
    is_full, seen = seen.diagonal(), seen | np.eye(len(spans), dtype=bool)
    names = [visible.tobytes() for visible in seen]
    alike = Counter(names)
    causal: list[list[int]] = []
    full: dict[bytes, list[int]] = {}
    for run, (start, stop) in enumerate(spans):
        others = seen[run].copy()
        others[run] = False
        # A run of one token is both.
        is_causal, is_either = not is_full[run], stop - start == 1
        if causal and (is_causal or is_either) and others.tobytes() == names[causal[-1][-1]]:
            causal[-1].append(run)
        elif is_causal or (is_either and alike[names[run]] == 1):
            causal.append([run])
        else:
            full.setdefault(names[run], []).append(run)
    for own in causal:
        keys = np.flatnonzero(seen[own[0]]).tolist()
        # What lies ahead comes first: what lies behind then goes on into the queries.
        order = [*(k for k in keys if k > own[0]), *(k for k in keys if k < own[0]), *own]
        yield Segment(row, document, _pick(spans, own), _pick(spans, order), True)
    for own in full.values():
        yield Segment(row, document, _pick(spans, own), _pick(spans, np.flatnonzero(seen[own[0]]).tolist()), False)


def _of_padding(layout: SequenceLayout) -> Iterator[Segment]:
    """Padding with tokens behind it and before it sees those before it."""
    padding = layout.is_padding
    follows = (~padding).flip(1).cumsum(1).flip(1) > 0
    for row in (padding & follows).any(1).nonzero()[:, 0].tolist():
        edges = torch.diff(nn.functional.pad(padding[row].int(), (1, 1)))
        starts, stops = ((edges == step).nonzero()[:, 0].tolist() for step in (1, -1))
        before, reached = [], 0
        for start, stop in zip(starts, stops, strict=True):
            before += [Span(reached, start)] if start > reached else []
            if before and stop < padding.shape[1]:
                yield Segment(row, -1, (Span(start, stop),), tuple(before), False)
            reached = stop


def _pick(spans: list[Span], runs: list[int]) -> tuple[Span, ...]:
    return joined(spans[run] for run in runs)


# A plan is the segments of a batch as a tensor, which travels where transformers expects a 4-D mask.


def encode(found: Iterable[Segment]) -> Tensor:
    """The plan as a (1, 1, spans, 7) int64 tensor on the CPU."""
    rows = [
        (number, s.row, s.document, s.is_causal, is_key, *span)
        for number, s in enumerate(found)
        for is_key, spans in enumerate((s.queries, s.keys))
        for span in spans
    ]
    return torch.tensor(rows, dtype=torch.int64, device="cpu").view(1, 1, -1, _COLUMNS)


def decode(plan: Tensor) -> list[Segment]:
    found = []
    for _, lines in groupby(plan.view(-1, _COLUMNS).tolist(), key=itemgetter(0)):
        spans: tuple[list[Span], list[Span]] = [], []
        for line in lines:
            spans[line[4]].append(Span(*line[5:]))
        _, row, document, is_causal, *_ = line
        found.append(Segment(row, document, tuple(spans[0]), tuple(spans[1]), bool(is_causal)))
    return found


def is_plan(mask: object) -> TypeGuard[Tensor]:
    """Masks are boolean or floating; a plan is integers, so many a line."""
    return isinstance(mask, Tensor) and mask.dtype == torch.int64 and mask.shape[-1] == _COLUMNS


_COLUMNS = 7
