from __future__ import annotations

from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from aki.data.collate import ChatCollator
from aki.data.digits import DigitScenes
from aki.data.packing import PackedCollator, PackedRows, first_fit_decreasing, items_of, join, split_rows
from aki.training.stages import build_model


@given(st.lists(st.integers(1, 100), max_size=60), st.integers(100, 300))
def test_bins_hold_every_item_once_and_no_more_than_they_can(lengths, capacity):
    bins = first_fit_decreasing(lengths, capacity)
    assert sorted(item for items in bins for item in items) == list(range(len(lengths)))
    assert all(sum(lengths[item] for item in items) <= capacity for items in bins)
    # First fit leaves at most one bin half empty or emptier.
    assert sum(2 * sum(lengths[item] for item in items) <= capacity for items in bins) <= 1


def test_longest_first_into_the_first_bin_with_room():
    assert first_fit_decreasing([3, 7, 5, 4, 1], 10) == [[0, 1], [2, 3, 4]]


def test_a_sample_longer_than_a_row_is_a_sentence():
    with pytest.raises(ValueError, match="11 tokens does not fit a packed row of 10"):
        first_fit_decreasing([4, 11], 10)


@pytest.fixture
def parts(tiny_recipe):
    torch.manual_seed(0)
    model, processor = build_model(tiny_recipe)
    data = DigitScenes("train", "question", 40, processor.image_processor.size["height"], tiny_recipe.data.grid)
    return model.eval(), ChatCollator(processor, 512), data


def rows_of(parts, **options) -> PackedRows:
    _, collate, data = parts
    return PackedRows(data, [collate], **{"row_tokens": 100, "buffer": 20, **options})


@pytest.mark.parametrize("implementation", ["sdpa", "segments", "auto"])
@pytest.mark.parametrize("rule", ["causal", "mma"])
def test_losses_of_samples_are_those_that_they_have_unpacked(parts, implementation, rule):
    model, collate, data = parts
    model.set_attn_implementation({"text_config": implementation})
    model.config.attention_rule = rule
    rows = list(islice(rows_of(parts), 3))
    assert max(len(lengths_of(row)) for row in rows) > 1
    packed = label_losses(model, PackedCollator(collate.processor.tokenizer.pad_token_id)(rows))
    alone = {}
    for index in range(len(data)):
        sample = collate([data[index]])
        alone[tuple(sample["input_ids"][0].tolist())] = label_losses(model, sample)[0]
    for row, losses in zip(rows, packed, strict=True):
        documents = row["input_ids"][0].split(lengths_of(row))
        wanted = torch.cat([alone[tuple(document.tolist())] for document in documents])
        assert torch.allclose(losses, wanted, rtol=0, atol=1e-5)


def test_the_loss_of_a_packed_batch_is_that_of_its_samples_together(parts):
    model, collate, data = parts
    samples = [data[index] for index in range(8)]
    together = collate(samples)
    row = join([collate([sample]) for sample in samples])
    losses = [model(**inputs, attention_rule="mma").loss for inputs in (together, row)]
    assert float(losses[0].detach()) == pytest.approx(float(losses[1].detach()), abs=1e-6)


def lengths_of(row) -> list[int]:
    starts = (row["position_ids"][0] == 0).nonzero()[:, 0].tolist()
    return [stop - start for start, stop in zip(starts, [*starts[1:], row["input_ids"].shape[1]], strict=True)]


@torch.no_grad()
def label_losses(model, batch) -> list[torch.Tensor]:
    """For each row, the losses of its labels, one after the other."""
    targets = batch["labels"][:, 1:]
    logits = model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits
    losses = cross_entropy(logits[:, :-1].transpose(1, 2), targets, reduction="none")
    return [row[target != -100] for row, target in zip(losses, targets, strict=True)]


def same(first, second) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def test_the_same_rows_again_for_a_seed_and_others_for_another(parts):
    first, again, other = (list(islice(rows_of(parts, seed=seed), 12)) for seed in (1, 1, 2))
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    assert not same(first[0], other[0])


def test_an_epoch_has_every_sample_once_also_over_workers(parts):
    def texts(rows):
        return sorted(tuple(d.tolist()) for row in rows for d in row["input_ids"][0].split(lengths_of(row)))

    rows = rows_of(parts)
    alone = list(islice(rows, samples_in_rows(rows, 40)))
    loader = DataLoader(rows, batch_size=None, num_workers=2)
    assert texts(islice(loader, len(alone))) == texts(alone)


def samples_in_rows(rows, samples: int) -> int:
    """How many rows hold the first so many samples."""
    seen = 0
    for number, row in enumerate(rows, 1):
        seen += len(lengths_of(row))
        if seen == samples:
            return number
    raise AssertionError


def test_15_a_batch_of_packed_rows_comes_apart_into_rows_with_their_own_media_of_every_kind():
    """Issue 12, entry 15: only pictures were cut by row, so each row had the videos and audio of all."""

    def row(tokens, **media):
        ids = torch.arange(tokens)[None]
        whole = {name: ids.clone() for name in ("input_ids", "prompt_block_ids", "labels", "position_ids")}
        shapes = {"pixel_values": (3, 4, 4), "pixel_values_videos": (2, 3, 4, 4), "input_features": (5, 7)}
        return whole | {kind: torch.randn(items, *shapes[kind]) for kind, items in media.items()}

    rows = [
        row(5, pixel_values=2),
        row(5, pixel_values_videos=1, input_features=3),
        row(5),
        row(5, pixel_values=1, pixel_values_videos=2),
    ]
    batch = PackedCollator(0)(rows)
    apart = list(split_rows(batch, len(rows), items_of(rows)))
    assert [one.keys() for one in apart] == [one.keys() for one in rows]
    assert all(torch.equal(one[name], own[name]) for one, own in zip(apart, rows, strict=True) for name in own)
