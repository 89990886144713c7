"""Segments against the masks of the oracle and of the rules' own function, for every rule."""

from __future__ import annotations

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import layouts, make_layout, mask_of, scoped_layouts

from aki.attention import RULES, Rule, dense_mask, get_rule
from aki.attention.segments import Span, allowed_pairs, decode, encode, far, is_plan, segments
from aki.layout import SequenceLayout

every_rule = pytest.mark.parametrize("name", oracle.NAMES)


def kept(layout, mask):
    """Without the rows of padding at the end of a row, which segments leave out."""
    follows = (~layout.is_padding).flip(1).cumsum(1).flip(1) > 0
    return mask & follows[:, :, None]


def reproduces(rule: Rule, layout, wanted):
    found = segments(rule, layout)
    assert torch.equal(mask_of(found, layout.shape), kept(layout, wanted).long()), (
        f"runs are not enough for the rule {rule.name!r}: it tells tokens apart that are alike in all of the layout by "
        "more than `k <= q`. Give the layout a field that says what the rule reads."
    )
    assert allowed_pairs(found) == int(kept(layout, wanted).sum())
    assert decode(encode(found)) == found
    position = torch.arange(layout.shape[1])
    last = torch.where(wanted & ~layout.is_padding[:, :, None], position, -1).amax(-1)
    assert torch.equal(far(rule, layout), torch.where(layout.is_padding, position, last))


@every_rule
@given(batch=oracle.batches())
@settings(max_examples=60)
def test_segments_reproduce_the_oracles_mask_and_reach(name, batch):
    reproduces(get_rule(name), batch.layout, oracle.masks(name, batch.rows))


@given(layouts(), st.sampled_from(oracle.NAMES))
@settings(max_examples=150)
def test_segments_reproduce_masks_with_padding_between_documents(layout, name):
    reproduces(get_rule(name), layout, dense_mask(get_rule(name), layout))


@given(scoped_layouts(), st.sampled_from([*oracle.NAMES, "mma_scoped+prefix"]))
@settings(max_examples=100)
def test_segments_reproduce_masks_with_scopes(layout, name):
    reproduces(get_rule(name), layout, dense_mask(get_rule(name), layout))


def of_one_document(name, *parts):
    found = segments(name, make_layout([(0, [list(parts)], False)]))
    return [(*(["-".join(map(str, span)) for span in spans] for spans in s[2:4]), s.is_causal) for s in found]


CHAT = ("text", 2), ("image", 5), ("text", 3), ("answer", 4)


def test_causal_attention_is_one_segment():
    assert of_one_document("causal", *CHAT) == [(["0-14"], ["0-14"], True)]


def test_under_mma_the_question_stands_before_the_picture_and_its_past():
    assert of_one_document("mma", *CHAT) == [
        (["0-2"], ["0-2"], True),
        (["2-7"], ["7-10", "0-7"], True),
        (["7-14"], ["0-14"], True),
    ]


def test_what_sees_the_same_is_one_full_segment():
    assert of_one_document("prefix", *CHAT) == [(["0-10"], ["0-10"], False), (["10-14"], ["0-14"], True)]
    assert of_one_document("image_bidirectional", *CHAT) == [
        (["0-2"], ["0-2"], True),
        (["2-7"], ["0-7"], False),
        (["7-14"], ["0-14"], True),
    ]
    # The picture's rings are 0 and 1 in turn: tokens of a ring are one segment, wherever they stand.
    assert of_one_document("concentric", *CHAT)[1:3] == [
        (["2-3", "4-5", "6-7"], ["0-3", "4-5", "6-7"], False),
        (["3-4", "5-6"], ["0-7"], False),
    ]


def test_padding_before_other_tokens_keeps_its_causal_row():
    found = segments("mma", make_layout([(2, [[("text", 2)], [("text", 1)]], True)]))
    assert [(s.document, *s[2:]) for s in found] == [
        (0, (Span(2, 4),), (Span(2, 4),), True),
        (-1, (Span(4, 6),), (Span(2, 4),), False),
        (1, (Span(6, 7),), (Span(6, 7),), True),
    ]


def test_nothing_but_padding_is_no_segment():
    assert segments("mma", make_layout([(4, [], False)])) == []
    assert is_plan(encode([]))


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_a_batch_of_no_tokens_has_no_segments(shape):
    none = torch.zeros(shape, dtype=torch.int64)
    layout = SequenceLayout(none, none, none, none)
    assert segments("mma", layout) == []
    assert far(get_rule("mma"), layout).shape == shape


@pytest.mark.parametrize("name", oracle.NAMES)
def test_another_default_device_changes_nothing(name):
    """As torch.set_default_device("cuda") in a script: what is made here stays with the batch."""
    layout = make_layout([(2, [list(CHAT), list(CHAT)], True), (0, [list(CHAT)], False)])
    rule = get_rule(name)
    wanted = encode(segments(rule, layout)), far(rule, layout)
    with torch.device("meta"):
        found = encode(segments(name, layout)), far(rule, layout)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_masks_are_not_plans():
    ones = [torch.ones(1, 1, 2, 2, dtype=dtype) for dtype in (torch.float32, torch.bool, torch.int64)]
    assert not any(is_plan(mask) for mask in (None, *ones))


def windowed(layout, b, q, k):
    return (k <= q) & (q - k < 3)


def answers_apart(layout, b, q, k):
    """A new rule, as CONTRIBUTING.md says: causal, but answers don't see media."""
    answer = (layout.prompt_block[b, q] < 0) & (layout.modality[b, q] == 0)
    return (k <= q) & ~(answer & (layout.modality[b, k] != 0))


def test_a_rule_is_one_function_and_one_sentence_of_the_oracle(monkeypatch):
    monkeypatch.setitem(RULES, "apart", Rule("apart", answers_apart))
    monkeypatch.setitem(
        oracle.RULES,
        "apart",
        lambda row, q, k: k <= q and not (row[q].block == -1 and row[q].modality == 0 and row[k].modality),
    )

    @given(batch=oracle.batches())
    @settings(max_examples=40)
    def check(batch):
        for name in ("apart", "apart+mma"):
            wanted = oracle.masks(name, batch.rows)
            assert torch.equal(dense_mask(get_rule(name), batch.layout), wanted)
            reproduces(get_rule(name), batch.layout, wanted)

    check()


def test_a_rule_for_which_runs_are_not_enough_is_told_so_in_a_sentence():
    layout = make_layout([(0, [list(CHAT)], False)])
    rule = Rule("windowed", windowed)
    with pytest.raises(AssertionError, match="runs are not enough for the rule 'windowed'"):
        reproduces(rule, layout, dense_mask(rule, layout))
