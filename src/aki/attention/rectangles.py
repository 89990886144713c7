"""A rule that is causal plus rectangles, as the list of attention calls that compute it: the plan.

A rectangle is a run of queries that all see the same run of keys. The plan of a batch is a few rows of integers,
however long the batch is: one causal square a document, and the rectangles that the rule adds. Nothing in it is empty,
because some kernels do not survive a call without keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby, pairwise
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor

from aki.layout import TEXT, SequenceLayout


class Run(NamedTuple):
    """Consecutive tokens of one row that are alike: `start` to `stop - 1`."""

    row: int
    start: int
    stop: int
    document: int
    modality: int
    prompt_block: int


class Part(NamedTuple):
    """One attention call: these rows and queries over these keys, causal (a square) or all of them (a rectangle)."""

    first_row: int
    stop_row: int
    first_query: int
    stop_query: int
    first_key: int
    stop_key: int
    is_causal: int


def runs(layout: SequenceLayout) -> list[Run]:
    """The maximal runs of tokens alike in document, modality and prompt block, in order; padding is left out."""
    kinds = torch.stack([layout.document, layout.modality, layout.prompt_block], dim=-1).cpu()
    starts = torch.ones(kinds.shape[:2], dtype=torch.bool)
    starts[:, 1:] = (kinds[:, 1:] != kinds[:, :-1]).any(-1)
    begins = starts.nonzero().tolist()
    ends = [start if row == before else kinds.shape[1] for (before, _), (row, start) in pairwise(begins)]
    ends += [kinds.shape[1]] * (len(begins) > 0)
    found = [
        Run(row, start, stop, *kind)
        for (row, start), stop, kind in zip(begins, ends, kinds[starts].tolist(), strict=True)
    ]
    return [run for run in found if run.document >= 0]


def mma_rectangles(layout: SequenceLayout) -> Iterator[tuple[Run, Run]]:
    """What `mma` adds to `causal`: (media, what comes later in its prompt block and is of another modality)."""
    blocks = groupby(sorted(runs(layout), key=_block), key=_block)
    for (_, _, block), members in blocks:
        if block >= 0:
            inside = list(members)
            for i, media in enumerate(inside):
                if media.modality != TEXT:
                    yield from ((media, later) for later in inside[i + 1 :] if later.modality != media.modality)


def no_rectangles(layout: SequenceLayout) -> Iterator[tuple[Run, Run]]:
    """What `causal` adds to itself."""
    return iter(())


def plan_parts(layout: SequenceLayout, rectangles: Iterator[tuple[Run, Run]]) -> list[Part]:
    """The calls that compute causal attention within documents, and these rectangles beside it.

    Rows that follow each other and need the same calls share them. A row's square comes before its rectangles, and
    rectangles of the same queries follow each other.
    """
    rows: list[list[Part]] = [[] for _ in range(layout.shape[0])]
    for document, pieces in groupby(sorted(_document_runs(layout), key=_document), key=_document):
        behind: list[Run] = []
        for piece in pieces:
            rows[document[0]].append(_call(piece, piece, is_causal=1))
            # Padding in the middle of a document cuts it, and the later piece still sees the earlier ones.
            rows[document[0]] += [_call(piece, seen) for seen in behind]
            behind.append(piece)
    for queries, keys in rectangles:
        rows[queries.row].append(_call(queries, keys))
    parts: list[Part] = []
    first = 0
    for calls, alike in groupby(rows):
        stop = first + len(list(alike))
        in_order = sorted(calls, key=lambda call: (-call.is_causal, call))
        parts += [call._replace(first_row=first, stop_row=stop) for call in in_order]
        first = stop
    return parts


def _call(queries: Run, keys: Run, is_causal: int = 0) -> Part:
    """A part whose rows are still to be filled in."""
    return Part(0, 0, queries.start, queries.stop, keys.start, keys.stop, is_causal)


def encode_plan(parts: list[Part]) -> Tensor:
    """The plan as a (1, 1, calls, 7) int64 tensor on the CPU: it travels where transformers expects a 4-D mask."""
    return torch.tensor(parts, dtype=torch.int64).view(1, 1, -1, len(Part._fields))


def decode_plan(plan: Tensor) -> list[Part]:
    return [Part(*call) for call in plan.flatten(0, 2).tolist()]


def is_plan(mask: object) -> TypeGuard[Tensor]:
    """Masks are boolean or floating; a plan is integers, so many a call."""
    return isinstance(mask, Tensor) and mask.dtype == torch.int64 and mask.shape[-1] == len(Part._fields)


def squares_and_rectangles(parts: list[Part], masked_length: int) -> tuple[list[tuple[Part, list[Part]]], list[Part]]:
    """The causal squares, each with the rectangles that are computed with it, and the rectangles that are left.

    In a document of up to `masked_length` tokens (the tile that the kernel computes whole anyway) rectangles cost more
    as calls than as a mask of that document.
    """
    rectangles = [part for part in parts if not part.is_causal]
    squares = []
    for square in (part for part in parts if part.is_causal):
        short = square.stop_query - square.first_query <= masked_length
        own = [part for part in rectangles if short and _is_inside(part, square)]
        rectangles = [part for part in rectangles if part not in own]
        squares.append((square, own))
    return squares, rectangles


def _is_inside(part: Part, square: Part) -> bool:
    first, stop = square.first_query, square.stop_query
    return part[:2] == square[:2] and first <= part.first_query < stop and first <= part.first_key < stop


def allowed_pairs(parts: list[Part]) -> int:
    """How many (query, key) pairs the calls compute, over the rows."""
    total = 0
    for part in parts:
        queries, keys = part.stop_query - part.first_query, part.stop_key - part.first_key
        total += (part.stop_row - part.first_row) * (queries * (queries + 1) // 2 if part.is_causal else queries * keys)
    return total


def _document_runs(layout: SequenceLayout) -> list[Run]:
    nothing = torch.zeros_like(layout.document)
    return runs(SequenceLayout(layout.document, nothing, nothing, nothing))


def _document(run: Run) -> tuple[int, int]:
    return run.row, run.document


def _block(run: Run) -> tuple[int, int, int]:
    return run.row, run.document, run.prompt_block
