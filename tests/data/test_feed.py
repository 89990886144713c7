"""Feeds: the same batches whatever the number of workers, and from any point on."""

from dataclasses import asdict, replace
from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import Numbers, collator

from aki.data import feed as feed_module
from aki.data.feed import Feed, Loader, Position
from aki.data.mixture import Mixture, mixture_weights
from aki.data.orders import ORDERS, template_in_order
from aki.data.report import TooManyBadSamples


def mixture(*bad):
    sources = [Numbers("a", 300, bad), Numbers("bb", 7), Numbers("ccc", 30)]
    return Mixture(sources, mixture_weights("weights", [5, 1, 2], None), 1)


def loader(workers=0, position=None, batch_size=3, rank=0, ranks=1, row_tokens=None, samples=None, **options):
    feed = Feed(samples or mixture(2, 30), [collator()], batch_size, row_tokens, rank, ranks)
    return Loader(feed, workers, Position(**position) if position else None, **{"max_bad_share": 0.5, **options})


def batches(loader, size):
    return list(islice(loader, size))


def same(one, two):
    return len(one) == len(two) and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) for a, b in zip(one, two, strict=True)
    )


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(feed_module, "PACKED_CHUNK", 8)


@pytest.mark.parametrize("row_tokens", [None, 90])
def test_workers_do_not_matter(row_tokens):
    alone, with_workers = loader(row_tokens=row_tokens), loader(3, row_tokens=row_tokens)
    assert same(batches(alone, 9), batches(with_workers, 9))
    assert (alone.position.chunk, alone.position.row) == (with_workers.position.chunk, with_workers.position.row)
    assert alone.report.to_dict() == with_workers.report.to_dict()


@settings(max_examples=25)
@given(cut=st.integers(1, 12), more=st.integers(1, 4), packed=st.booleans(), batch_size=st.integers(1, 4))
def test_resumed_anywhere(cut, more, packed, batch_size):
    options = {"batch_size": batch_size, "row_tokens": 90 if packed else None}
    whole = loader(**options)
    expected = batches(whole, cut + more)
    begun = loader(**options)
    iterator = iter(begun)
    list(islice(iterator, cut))
    resumed = loader(position=asdict(begun.position), **options)
    assert same(batches(resumed, more), expected[cut:])
    assert resumed.position == whole.position


def test_resumed_on_another_number_of_workers():
    expected = batches(loader(), 8)
    begun = loader(2)
    iterator = iter(begun)
    list(islice(iterator, 3))
    assert same(batches(loader(3, asdict(begun.position)), 5), expected[3:])


def test_ranks_see_their_own():
    whole = batches(loader(batch_size=2), 6)
    ranks = [batches(loader(batch_size=2, rank=rank, ranks=2), 3) for rank in range(2)]
    assert same([batch for pair in zip(*ranks, strict=True) for batch in pair], whole)


def test_packed_rows_hold_the_samples_in_the_batches():
    """What is packed is what comes unpacked: the same answers, each once."""
    plain = [batch["labels"][batch["labels"] >= 0] for batch in batches(loader(batch_size=8), 2)]
    rows = batches(loader(batch_size=1, row_tokens=90), 8)
    packed = torch.cat([row["labels"][row["labels"] >= 0] for row in rows]).tolist()
    assert all(row["input_ids"].shape[1] <= 90 and (row["position_ids"] == 0).sum() > 1 for row in rows[:3])
    # A chunk is eight samples.
    assert sorted(packed[: len(plain[0])]) == sorted(plain[0].tolist())


def orders():
    return [replace(collator(), template=template_in_order(collator().processor, None, o)) for o in ORDERS["both"]]


def test_both_orders_of_each_sample_are_in_one_batch():
    """A batch is that of the one order, and then that of the other, which two feeds of one order each would give."""
    both, *alone = (
        Loader(Feed(mixture(2, 30), collators, 3), 0, max_bad_share=0.5)
        for collators in (orders(), *([one] for one in orders()))
    )
    for batch, *halves in zip(*(batches(one, 6) for one in (both, *alone)), strict=True):
        assert len(batch["pixel_values"]) == len(batch["input_ids"]) == 6
        assert torch.equal(batch["pixel_values"], torch.cat([half["pixel_values"] for half in halves]))
        for row in range(6):
            half, own = halves[row // 3], row % 3
            real = batch["attention_mask"][row].bool()
            for name in ("input_ids", "labels", "prompt_block_ids"):
                assert torch.equal(batch[name][row][real], half[name][own][half["attention_mask"][own].bool()]), name
        assert not torch.equal(*(half["input_ids"] for half in halves))
    assert both.report.to_dict() == alone[0].report.to_dict(), "a sample counts once"


def test_both_orders_resume_where_they_stood():
    def in_both(position=None):
        return Loader(Feed(mixture(2, 30), orders(), 3), 0, position, max_bad_share=0.5)

    expected = batches(in_both(), 6)
    begun = in_both()
    assert same(batches(begun, 2), expected[:2])
    assert same(batches(in_both(begun.position), 4), expected[2:])


def test_too_many_bad_samples_end_it_in_a_sentence():
    broken = mixture(*range(290))
    with pytest.raises(TooManyBadSamples, match=r"Most are 'broken image' in a .*for instance a/\d+: \d+ is bad"):
        batches(loader(samples=broken, max_bad_share=0.01), 50)
    everything = Mixture([Numbers("a", 3, range(3))], mixture_weights("uniform", [1], None), 0)
    with pytest.raises(TooManyBadSamples, match="20 samples in a row could not be used"):
        batches(loader(samples=everything, max_bad_share=0.9), 1)
