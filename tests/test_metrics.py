"""Metrics by hand-computed values, and against libraries that have them."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from aki.metrics import METRICS, _edits, anls, relaxed, vqa


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
        ("relaxed", "NaN", "nan", 1),
    ],
)
def test_by_hand(metric, said, right, score):
    assert METRICS[metric](said, [right]) == pytest.approx(score)


@pytest.mark.parametrize(
    ("metric", "said", "right", "score"),
    [
        ("exact", "red", ["blue", "red"], 1),
        ("anls", "hallo", ["abc", "hello"], 0.8),
        ("relaxed", "96", ["red", "100"], 1),
        # The people who said it find one less among the others: 1 of 10 is 9/10 of a third.
        ("vqa", "red", ["red"] + ["blue"] * 9, 0.3),
        ("vqa", "red", ["red"] * 2 + ["blue"] * 8, 0.6),
        ("vqa", "red", ["red"] * 3 + ["blue"] * 7, 0.9),
        ("vqa", "red", ["red"] * 4 + ["blue"] * 6, 1),
        ("vqa", "red", ["red", "red"], 1),
        ("vqa", "red", ["red", "blue"], 0.5),
    ],
)
def test_several_right_answers_by_hand(metric, said, right, score):
    assert METRICS[metric](said, right) == pytest.approx(score)


WORDS = ("red", "The red.", "red, ball", "red ball", "red/ball", "red-ball", "2", "two", "Two?", "none", "0", "1,000")
WORDS += ("1000", "U.S.", "us", "2.5", "25", "(2.5)")


@given(st.sampled_from(WORDS), st.lists(st.sampled_from(WORDS), min_size=4, max_size=10))
def test_vqa_is_lmms_evals(said, golds):
    theirs = pytest.importorskip("lmms_eval.tasks.vqav2.utils", reason="the dev extra has it")
    doc = {"question_id": 0, "answers": [{"answer": gold, "answer_id": i} for i, gold in enumerate(golds)]}
    assert vqa(said, golds) == pytest.approx(theirs.vqav2_process_results(doc, [said])["exact_match"])


@given(st.text("abAB", max_size=8), st.lists(st.text("abAB", max_size=8), min_size=1, max_size=3))
def test_anls_is_lmms_evals(said, golds):
    theirs = pytest.importorskip("lmms_eval.api.metrics", reason="the dev extra has it")
    (score,) = theirs.anls(references=golds, predictions=[said]).values()
    assume(score != 0.5)  # half wrong is wrong in the paper, and half right there
    assert anls(said, golds) == pytest.approx(score)


NUMBERS = st.one_of(
    st.integers(-200, 200).map(str), st.floats(-2, 2).map("{:.2f}".format), st.integers(0, 200).map("{}%".format)
)


@given(NUMBERS | st.sampled_from(("red", "Red")), NUMBERS | st.sampled_from(("red", "RED")))
def test_relaxed_is_lmms_evals(said, gold):
    theirs = pytest.importorskip("lmms_eval.tasks.chartqa.utils", reason="the dev extra has it")
    assume(gold.strip("-0.%"))  # of a right answer of nothing, theirs compares the texts
    assert relaxed(said, [gold]) == theirs.relaxed_correctness(said, gold)


@given(st.text("abc", max_size=8), st.text("abc", max_size=8))
def test_edits(one, other):
    levenshtein = pytest.importorskip("Levenshtein", reason="the dev extra has it")
    assert _edits(one, other) == levenshtein.distance(one, other)
