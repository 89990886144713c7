"""Random layouts for hypothesis, and attention by the definition."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from aki.attention.rules import Rule
from aki.attention.segments import Segment
from aki.layout import SequenceLayout, build_layout

_KINDS = st.sampled_from(["text", "image", "audio", "answer"])
_SEGMENT = st.tuples(_KINDS, st.integers(1, 7))
_DOCUMENT = st.lists(_SEGMENT, min_size=1, max_size=6)
_ROW = st.tuples(st.integers(0, 4), st.lists(_DOCUMENT, min_size=0, max_size=3), st.booleans())


@st.composite
def layouts(draw, max_rows: int = 3) -> SequenceLayout:
    """Batches of rows with padding left, right, or between documents; several documents, pictures and turns in each."""
    rows = draw(st.lists(_ROW, min_size=1, max_size=max_rows))
    return make_layout(rows)


@st.composite
def scoped_layouts(draw) -> SequenceLayout:
    """Rows that open and close scopes (1 and 2) anywhere, with images (3) and clips (4), several turns and documents,
    rings, and padding anywhere."""
    length = draw(st.integers(1, 20))

    def rows(choices):
        row = st.lists(st.sampled_from(choices), min_size=length, max_size=length)
        return torch.tensor(draw(st.lists(row, min_size=2, max_size=2)))

    kinds, now_and_then = [1, 2, 3, 4, 9, 9], [0, 0, 0, 1]
    ids, begins, changes, padding = (rows(choices) for choices in (kinds, now_and_then, [0, 0, 1], now_and_then))
    turn = changes.cumsum(1)
    blocks = torch.where(turn % 2 == 0, turn // 2, -1)
    absent = padding.bool()
    options = {"prompt_block_ids": blocks, "scope_token_ids": (1, 2)}
    layout = build_layout(ids.masked_fill(absent, 0), {1: 3, 2: 4}, 2, **options)
    document, block = begins.cumsum(1).masked_fill(absent, -1), blocks.masked_fill(absent, -1)
    return replace(layout, document=document, prompt_block=block, ring=torch.where(layout.is_media, changes, -1))


def mask_of(found: list[Segment], shape: tuple[int, int]) -> Tensor:
    """(batch, length, length): how many times each pair is computed, by the definition of a segment."""
    count = torch.zeros(*shape, shape[1], dtype=torch.int64)
    for segment in found:
        queries, keys = ([i for span in spans for i in range(*span)] for spans in (segment.queries, segment.keys))
        for i, query in enumerate(queries):
            for key in keys[: len(keys) - len(queries) + i + 1] if segment.is_causal else keys:
                count[segment.row, query, key] += 1
    return count


def make_layout(rows: list) -> SequenceLayout:
    """Rows of (padding before, documents as lists of (kind, length), padding between documents too)."""
    tokens = [_row_tokens(*row) for row in rows]
    length = max(1, *(len(row) for row in tokens)) if len(tokens) > 1 else max(1, len(tokens[0]))
    padded = [row + [(-1, 0, -1, -1)] * (length - len(row)) for row in tokens]
    document, modality, item, block = torch.tensor(padded).unbind(-1)
    # Any rings will do.
    ring = torch.where(modality > 0, torch.arange(length) % 2, -1)
    return SequenceLayout(document, modality, item, block, ring=ring)


def _row_tokens(before: int, documents: list, between: bool) -> list[tuple[int, int, int, int]]:
    padding = [(-1, 0, -1, -1)] * before
    tokens, items, block = list(padding), 0, 0
    for number, document in enumerate(documents):
        for kind, length in document:
            modality = {"image": 1, "audio": 2}.get(kind, 0)
            if kind == "answer":
                block += 1
            tokens += [(number, modality, items if modality else -1, -1 if kind == "answer" else block)] * length
            items += bool(modality)
        tokens += padding * between
    return tokens


def by_definition(
    rule: Rule, layout: SequenceLayout, query: Tensor, key: Tensor, value: Tensor, scale: float
) -> Tensor:
    """Softmax over the pairs that the rule allows; zero for padding at the end of a row."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    batch, length = layout.shape
    index = torch.arange(length)
    follows = (~layout.is_padding).flip(1).cumsum(1).flip(1) > 0
    allowed = torch.stack(
        [rule.sees(layout, torch.tensor(b), index[:, None], index) & follows[b, :, None] for b in range(batch)]
    )[:, None]
    weights = ((query @ key.transpose(-1, -2)) * scale).masked_fill(~allowed, -torch.inf).softmax(-1)
    return weights.nan_to_num() @ value
