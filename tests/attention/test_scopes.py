"""Hierarchical inputs: the scopes that a row's tokens open and close, and `mma_scoped` over them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aki.attention import check_no_leak, dense_mask, get_rule, reach
from aki.attention.guard import LeakError
from aki.layout import IMAGE, VIDEO, build_layout

OPEN, CLOSE, PICTURE, CLIP = 1, 2, 3, 4
SCOPED, MMA = get_rule("mma_scoped"), get_rule("mma")


def layout_of(rows: list[list[int]], scoped: bool = True, **kwargs):
    ids = torch.tensor(rows)
    scopes = (OPEN, CLOSE) if scoped else None
    return build_layout(ids, {IMAGE: PICTURE, VIDEO: CLIP}, None, scope_token_ids=scopes, **kwargs)


def paths(row: list[int]) -> list[tuple[int, ...]]:
    """For each token the scopes that it stands in, outermost first: a parser with a stack."""
    stack: list[int] = []
    found, opened = [], 0
    for token in row:
        if token == OPEN:
            opened += 1
            stack.append(opened)
        found.append(tuple(stack))
        if token == CLOSE and stack:
            stack.pop()
    return found


def oracle(row: list[int], blocks: list[int]) -> list[list[bool]]:
    path, media = paths(row), {PICTURE, CLIP}

    def sees(q: int, k: int) -> bool:
        if k <= q:
            return True
        other = row[k] != row[q] if row[k] in media else True
        above = path[q][: len(path[k])] == path[k]
        return row[q] in media and other and blocks[q] == blocks[k] != -1 and above

    return [[sees(q, k) for k in range(len(row))] for q in range(len(row))]


rows = st.integers(1, 24).flatmap(
    lambda length: st.lists(
        st.tuples(
            st.lists(st.sampled_from([OPEN, CLOSE, PICTURE, CLIP, 9, 9]), min_size=length, max_size=length),
            st.lists(st.sampled_from([0, 0, 0, 1, -1]), min_size=length, max_size=length).map(sorted),
        ),
        min_size=1,
        max_size=3,
    )
)


@given(rows)
def test_scopes_are_those_of_a_parser(drawn):
    layout = layout_of([row for row, _ in drawn])
    for (row, _), scope, end in zip(drawn, layout.scope.tolist(), layout.scope_end.tolist(), strict=True):
        found = paths(row)
        assert scope == [path[-1] if path else 0 for path in found]
        for i, path in enumerate(found):
            within = [p[-1] for p in found if p and (not path or p[: len(path)] == path)]
            assert end[i] == max(within, default=0)


@given(rows)
def test_mask_equals_the_oracles(drawn):
    blocks = torch.tensor([b for _, b in drawn])
    layout = layout_of([row for row, _ in drawn], prompt_block_ids=blocks)
    wanted = torch.tensor([oracle(row, b) for row, b in drawn])
    assert torch.equal(dense_mask(SCOPED, layout), wanted)


@given(rows)
def test_far_is_the_last_that_the_mask_shows(drawn):
    blocks = torch.tensor([b for _, b in drawn])
    layout = layout_of([row for row, _ in drawn], prompt_block_ids=blocks)
    mask = dense_mask(SCOPED, layout)
    position = torch.arange(mask.shape[-1])
    last = torch.where(mask, position, -1).amax(-1)
    assert torch.equal(SCOPED.far(layout), last)
    assert torch.equal(reach(SCOPED, layout), last.cummax(1).values)


@given(rows)
def test_one_scope_is_mma(drawn):
    blocks = torch.tensor([b for _, b in drawn])
    plain = [[9 if token in (OPEN, CLOSE) else token for token in row] for row, _ in drawn]
    for layout in (layout_of(plain, prompt_block_ids=blocks), layout_of(plain, False, prompt_block_ids=blocks)):
        assert torch.equal(dense_mask(SCOPED, layout), dense_mask(MMA, layout))
        assert torch.equal(SCOPED.far(layout), MMA.far(layout))
    wrapped = [[OPEN, *row, CLOSE] for row in plain]
    around = torch.nn.functional.pad(blocks, (1, 1), mode="replicate")
    layout = layout_of(wrapped, prompt_block_ids=around)
    assert torch.equal(dense_mask(SCOPED, layout), dense_mask(MMA, layout))


def test_a_figure_sees_its_caption_and_the_question_and_no_other_caption():
    #       [  image     caption ]    [   image     caption ]     question
    row = [OPEN, PICTURE, 10, CLOSE, OPEN, PICTURE, 11, CLOSE, 12, 13]
    mask = dense_mask(SCOPED, layout_of([row]))[0]
    assert mask[1].tolist() == [True, True, True, True, False, False, False, False, True, True]
    assert mask[5].tolist() == [True] * 10


def test_a_leak_through_a_scope_is_found():
    row = [OPEN, PICTURE, 10, CLOSE, 12, 13]
    labels = torch.tensor([[-100, -100, 10, 2, -100, -100]])
    layout = layout_of([row], prompt_block_ids=torch.zeros(1, 6, dtype=torch.long))
    with pytest.raises(LeakError, match="mma_scoped"):
        check_no_leak(SCOPED, layout, labels)
