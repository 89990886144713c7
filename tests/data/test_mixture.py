"""The mixture's order depends on the seed and a sample's number alone."""

from collections import Counter
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import Numbers, name_of

from aki.data.mixture import ATTEMPTS, GaveUp, Mixture, mixture_weights
from aki.data.report import DataReport

SOURCES = [Numbers("a", 40), Numbers("bb", 7), Numbers("ccc", 300)]


def names(mixture, numbers):
    return [mixture.read(number, name_of, DataReport()) for number in numbers]


def test_weights():
    assert mixture_weights("weights", [2, 1, 1], None).tolist() == [0.5, 0.25, 0.25]
    assert mixture_weights("proportional", [2, 1, 1], [30, 60, 10]).tolist() == pytest.approx([0.3, 0.6, 0.1])
    assert mixture_weights("uniform", [2, 1, 0], None).tolist() == pytest.approx([1 / 3] * 3)


def test_draws_by_weight_then_uniformly():
    """20,000 draws: each share within five standard deviations of what it should be."""
    size, weights = 20_000, np.array([0.2, 0.7, 0.1])
    draws = [Mixture(SOURCES, weights, 3).draw(number) for number in range(size)]
    for source, weight in enumerate(weights):
        found = sum(drawn == source for drawn, _ in draws)
        assert abs(found - size * weight) < 5 * (size * weight * (1 - weight)) ** 0.5
    within = Counter(index for source, index in draws if source == 1)
    expected = sum(within.values()) / 7
    assert set(within) == set(range(7))
    assert all(abs(n - expected) < 5 * expected**0.5 for n in within.values())


def test_a_weight_of_zero_is_never_drawn():
    assert {source for source, _ in map(Mixture(SOURCES, np.array([0.5, 0, 0.5]), 0).draw, range(500))} == {0, 2}


def test_the_seed_decides():
    weights = mixture_weights("uniform", [1, 1, 1], None)
    assert names(Mixture(SOURCES, weights, 1), range(50)) == names(Mixture(SOURCES, weights, 1), range(50))
    assert names(Mixture(SOURCES, weights, 1), range(50)) != names(Mixture(SOURCES, weights, 2), range(50))


@settings(max_examples=40)
@given(ranks=st.integers(1, 5), size=st.integers(1, 6), chunks=st.integers(1, 5), start=st.integers(0, 4))
def test_ranks_share_the_numbers_without_gap_or_repeat(ranks, size, chunks, start):
    mixture = Mixture(SOURCES, mixture_weights("uniform", [1, 1, 1], None), 5)
    taken = [
        mixture.take(chunk, (rank, ranks), size, name_of, DataReport())
        for chunk in range(start, start + chunks)
        for rank in range(ranks)
    ]
    first = start * ranks * size
    assert list(chain.from_iterable(taken)) == names(mixture, range(first, first + chunks * ranks * size))


def test_bad_samples_are_replaced_alike_everywhere_and_counted():
    bad = range(0, 40, 4)
    mixture = Mixture([Numbers("a", 40, bad), Numbers("bb", 7)], np.array([0.8, 0.2]), 0)
    whole, report = names(mixture, range(200)), DataReport()
    assert [mixture.read(number, name_of, report) for number in range(100, 200)] == whole[100:]
    assert not any(name in {f"a/{i}" for i in bad} for name in whole)
    attempts = [(n, a) for n in range(100, 200) for a in range(ATTEMPTS)]
    first_good = {n: next(a for m, a in attempts if m == n and not _is_bad(mixture, n, a)) for n in range(100, 200)}
    assert report.skipped == sum(first_good.values()) > 0
    assert report.sources["a"].skipped == Counter({"broken image": report.skipped})
    assert all(name == _name(mixture, *mixture.draw(n, first_good[n])) for n, name in enumerate(whole[100:], start=100))


def _is_bad(mixture, number, attempt):
    source, index = mixture.draw(number, attempt)
    return index in mixture.sources[source].bad


def _name(mixture, source, index):
    return f"{mixture.sources[source].name}/{index}"


def test_it_gives_up_where_nothing_is_good():
    with pytest.raises(GaveUp, match=r"20 samples in a row.*20 of 20 samples skipped: a broken image 20"):
        Mixture([Numbers("a", 3, range(3))], np.array([1.0]), 0).read(0, name_of, DataReport())
