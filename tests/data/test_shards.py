"""Shards: what each kind says, who reads what, resuming, and what is malformed."""

from collections import Counter
from dataclasses import asdict
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from streams import captions, collator, name_of, ocr, picture, write_shard

from aki.data import shards as shards_module
from aki.data.feed import Feed, Loader, Position
from aki.data.report import DataReport, TooManyBadSamples
from aki.data.shards import ShardError, ShardMixture, open_shards


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(shards_module, "BLOCK", 4)


@pytest.fixture(scope="module")
def urls(tmp_path_factory):
    return captions(tmp_path_factory.mktemp("shards"))


def reader(urls, workers=1, ranks=1, places=None, seed=0):
    return ShardMixture([open_shards("kale", urls)], np.ones(1), seed, workers, ranks, places)


def captions_of(samples, chunks, size, rank=0, ranks=1):
    use = lambda sample: sample.answer  # noqa: E731
    return [caption for chunk in chunks for caption in samples.take(chunk, (rank, ranks), size, use, DataReport())]


@pytest.mark.parametrize(
    ("kind", "text", "caption"),
    [
        ("kale", b" a cat.\n", "a cat."),
        ("ocr", ocr(" a sign that says STOP"), "a sign that says STOP"),
        ("grounding", b"[['a dog <box>', (1, 2)], 'more']\n", "a dog <box>"),
    ],
)
def test_captions_as_released(tmp_path, kind, text, caption):
    for extension in ("jpg", "png", "jpeg"):
        url = write_shard(tmp_path / f"{extension}.tar", [("0001", {extension: picture(), "txt": text, "json": b"{}"})])
        (sample,) = reader_of(kind, url).take(0, (0, 1), 1, lambda sample: sample, DataReport())
        assert sample.answer == caption
        assert sample.id == f"{extension}.tar/0001"
        assert [part["type"] for part in sample.messages[0]["content"]] == ["image"]
        assert sample.messages[0]["content"][0]["image"] == picture()


def reader_of(kind, *urls):
    return ShardMixture([open_shards(kind, urls)], np.ones(1), 0, 1)


def test_one_pass_reads_every_sample_once_in_another_order_than_the_next(urls):
    first, second = (captions_of(reader(urls), range(80), 1)[cut : cut + 40] for cut in (0, 40))
    everything = {f"{shard}-{i}" for shard in range(4) for i in range(10)}
    assert set(first) == set(second) == everything
    assert first != second
    in_file_order = [f"{shard}-{i}" for shard in range(4) for i in range(10)]
    assert first != in_file_order
    assert first != captions_of(reader(urls, seed=1), range(40), 1)


@pytest.mark.parametrize(("ranks", "workers"), [(1, 4), (2, 2), (4, 1), (1, 3)])
def test_a_pass_is_dealt_out_without_gap_or_repeat(urls, ranks, workers):
    seen = Counter()
    for rank in range(ranks):
        samples = reader(urls, workers, ranks)
        for worker in range(workers):
            shards = len(samples.sets[0].urls[rank * workers + worker :: ranks * workers])
            seen.update(captions_of(samples, [worker] * shards, 10, rank, ranks))
    assert seen == Counter({f"{shard}-{i}": 1 for shard in range(4) for i in range(10)})


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(1, 30), batch_size=st.integers(1, 5), packed=st.booleans())
def test_resumed_anywhere(urls, cut, batch_size, packed):
    def loader(position=None):
        position = position or Position()
        samples = ShardMixture(
            [open_shards("kale", urls), open_shards("kale", urls[:1], "other")],
            np.array([0.7, 0.3]),
            0,
            1,
            places=position.places,
        )
        return Loader(Feed(samples, [collator()], batch_size, 60 if packed else None), 0, position)

    expected = list(islice(loader(), cut + 3))
    begun = loader()
    iterator = iter(begun)
    list(islice(iterator, cut))
    resumed = list(islice(loader(Position(**asdict(begun.position))), 3))
    for one, two in zip(resumed, expected[cut:], strict=True):
        assert torch.equal(one["input_ids"], two["input_ids"])


def test_resumed_with_workers(urls):
    def loader(position=None):
        position = position or Position()
        return Loader(Feed(reader(urls, 2, places=position.places), [collator()], 3), 2, position)

    expected = list(islice(loader(), 8))
    for cut in (3, 4):
        begun = loader()
        iterator = iter(begun)
        list(islice(iterator, cut))
        resumed = list(islice(loader(begun.position), 8 - cut))
        assert all(
            torch.equal(one["input_ids"], two["input_ids"]) for one, two in zip(resumed, expected[cut:], strict=True)
        )


def test_resuming_does_not_decode_what_it_passes_over(urls, monkeypatch):
    begun = reader(urls)
    captions_of(begun, range(7), 1)
    resumed = reader(urls, places={"0": begun.place})
    asked = []
    original = shards_module.ShardSet.sample
    monkeypatch.setattr(
        shards_module.ShardSet, "sample", lambda self, member: asked.append(member) or original(self, member)
    )
    captions_of(resumed, [7], 1)
    assert len(asked) == 1


def test_brace_ranges_and_urls(urls, monkeypatch):
    pattern = urls[0].replace("000.tar", "{000..003}.tar")
    assert open_shards("kale", [pattern]).urls == tuple(urls)
    monkeypatch.setenv("AKI_ALLOW_PIPES", "1")
    piped = open_shards("kale", [f"pipe:cat {urls[0]}"])
    assert sorted(captions_of(ShardMixture([piped], np.ones(1), 0, 1), [0], 10)) == [f"0-{i}" for i in range(10)]
    assert open_shards("kale", [f"file:{urls[0]}"]).urls == (f"file:{urls[0]}",)
    with pytest.raises(ShardError, match="no shard at file:/nowhere"):
        open_shards("kale", ["file:/nowhere/000.tar"])


def test_refusals(urls, tmp_path):
    with pytest.raises(ShardError, match="no shards of the kind 'cale'; there are kale, ocr, grounding"):
        open_shards("cale", urls)
    with pytest.raises(ShardError, match=r"no shard at .*004.tar \(1 of 5\)"):
        open_shards("kale", [urls[0].replace("000.tar", "{000..004}.tar")])
    with pytest.raises(ShardError, match=r"has 4 shard\(s\), 2 process\(es\) with 3 worker\(s\) each need 6"):
        reader(urls, 3, 2)


def test_malformed_members_are_counted_and_the_rest_is_read(tmp_path):
    good = {"jpg": picture(), "txt": ocr("good")}
    members = [
        ("a", good),
        ("b", {"txt": ocr("no picture")}),
        ("c", {"jpg": picture()}),
        ("d", {"jpg": picture(), "txt": b"not json"}),
        ("e", {"jpg": picture(), "txt": b'[{"text": "only one"}]'}),
        ("f", {"jpg": picture(), "txt": b"\xff\xfe"}),
        ("g", {"jpg": picture(), "txt": ocr("  ")}),
        ("h", {"jpg": b"no picture", "txt": ocr("broken")}),
        ("i", {"jpg": picture(size=(2, 2)), "txt": ocr("tiny")}),
        ("j", {"jpg": picture(), "txt": b'[{}, {"text": 3}]'}),
        ("l", {"jpg": picture(), "txt": b'[{}, {"text": "half \\ud800"}]'}),
        ("k", good),
    ]
    url = write_shard(tmp_path / "bad.tar", members)
    report = DataReport()
    taken = reader_of("ocr", url).take(0, (0, 1), 4, used, report)
    assert set(taken) == {"ocr/bad.tar/a", "ocr/bad.tar/k"}
    reasons = report.sources["ocr"].skipped
    # Between the first and the last two of the good ones lies all that is bad, once.
    assert set(reasons) == {"missing image", "malformed entry", "empty text", "broken image", "absurd size"}
    assert "bad.tar/b: it has no jpg, png, jpeg." in report.sources["ocr"].examples["missing image"]


def used(sample):
    return collator().encode(sample) and name_of(sample)


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (lambda tar: tar[:3360], "unexpected end of data"),
        (lambda tar: b"<html>not found</html>" * 100, "invalid header"),
        (lambda tar: tar[-10240:], "holds no samples"),
    ],
    ids=["cut", "no tar", "empty"],
)
def test_a_broken_shard_is_counted_and_the_next_is_read(tmp_path, broken, said):
    good = {"jpg": picture(), "txt": ocr("good")}
    whole = write_shard(tmp_path / "whole.tar", [(str(i), good) for i in range(8)])
    other = tmp_path / "other.tar"
    other.write_bytes(broken((tmp_path / "whole.tar").read_bytes()))
    report = DataReport()
    taken = reader_of("ocr", whole, str(other)).take(0, (0, 1), 20, used, report)
    assert {f"ocr/whole.tar/{i}" for i in range(8)} <= set(taken)
    assert set(report.sources["ocr"].skipped) == {"malformed entry"}
    assert said in " ".join(report.sources["ocr"].examples["malformed entry"])


def test_a_shard_that_is_gone_ends_in_a_sentence(urls, tmp_path):
    gone = ShardMixture([open_shards("kale", ["http://127.0.0.1:9/none.tar"])], np.ones(1), 0, 1)
    with pytest.raises(TooManyBadSamples, match="malformed entry"):
        next(iter(Loader(Feed(gone, [collator()], 2), 0)))
