"""Metrics by hand-computed values, and against libraries that have them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aki.metrics import METRICS, _edits


@pytest.mark.parametrize(
    ("metric", "said", "right", "score"),
    [
        ("exact", " red ", "red", 1),
        ("exact", "Red", "red", 0),
        ("vqa", "The red, ball.", "red ball", 1),
        ("vqa", "two", "2", 1),
        ("vqa", "1,000", "1000", 1),
        ("vqa", "isn't", "isnt", 1),
        ("vqa", "2.5", "25", 0),
        ("vqa", "blue", "red", 0),
        ("anls", "Hello", "hello", 1),
        ("anls", "hallo", "hello", 0.8),
        ("anls", "abc", "xyz", 0),
        ("anls", "ab", "ax", 0),  # exactly half wrong
        ("relaxed", "104.9", "100", 1),
        ("relaxed", "105.1", "100", 0),
        ("relaxed", "14%", "0.14", 1),
        ("relaxed", "1,000", "1000", 1),
        ("relaxed", "Red", "red", 1),
        ("relaxed", "0", "0", 1),
        ("relaxed", "0.1", "0", 0),
    ],
)
def test_by_hand(metric, said, right, score):
    assert METRICS[metric](said, right) == pytest.approx(score)


@given(st.text("abc", max_size=8), st.text("abc", max_size=8))
def test_edits(one, other):
    levenshtein = pytest.importorskip("Levenshtein", reason="the dev extra has it")
    assert _edits(one, other) == levenshtein.distance(one, other)
