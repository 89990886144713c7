from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import layouts, make_layout

from aki.attention import dense_mask, get_rule
from aki.attention.rectangles import allowed_pairs, decode_plan, encode_plan, is_plan, plan_parts, runs


def parts_of(rule, layout):
    return plan_parts(layout, get_rule(rule).rectangles(layout))


@settings(max_examples=300, deadline=None)
@given(layouts(), st.sampled_from(["causal", "mma"]))
def test_the_parts_cover_every_allowed_pair_once_and_no_other(layout, rule):
    parts = parts_of(rule, layout)
    count = torch.zeros(*layout.shape, layout.shape[1], dtype=torch.int64)
    for part in parts:
        queries = torch.arange(part.first_query, part.stop_query)
        keys = torch.arange(part.first_key, part.stop_key)
        assert len(queries) > 0
        assert len(keys) > 0
        seen = keys <= queries[:, None] if part.is_causal else torch.ones(len(queries), len(keys), dtype=torch.bool)
        count[part.first_row : part.stop_row, part.first_query : part.stop_query, part.first_key : part.stop_key] += (
            seen
        )
    wanted = dense_mask(get_rule(rule), layout) & ~layout.is_padding[:, :, None]
    assert torch.equal(count, wanted.long())
    assert allowed_pairs(parts) == int(wanted.sum())


@settings(max_examples=50, deadline=None)
@given(layouts())
def test_a_plan_says_what_its_parts_say(layout):
    parts = parts_of("mma", layout)
    assert decode_plan(encode_plan(parts)) == parts


def test_one_turn_is_one_square_and_one_rectangle():
    document = [("text", 2), ("image", 5), ("text", 3), ("answer", 4)]
    parts = parts_of("mma", make_layout([(0, [document], False)] * 3))
    assert [tuple(part) for part in parts] == [(0, 3, 0, 14, 0, 14, 1), (0, 3, 2, 7, 7, 10, 0)]


def test_runs_leave_out_padding():
    found = runs(make_layout([(2, [[("image", 3), ("text", 1)]], False)]))
    assert [(run.start, run.stop, run.modality) for run in found] == [(2, 5, 1), (5, 6, 0)]


def test_masks_are_not_plans():
    assert is_plan(encode_plan([]))
    ones = [torch.ones(1, 1, 2, 2, dtype=dtype) for dtype in (torch.float32, torch.bool, torch.int64)]
    assert not any(is_plan(mask) for mask in (None, *ones))
