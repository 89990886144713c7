"""The rivals of segments in benchmarks/attention.py are no straw men, and train_step.py counts what it says."""

from __future__ import annotations

import importlib
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

HEADS = (2, 16)


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))

    def script(name):
        monkeypatch.delitem(sys.modules, name, raising=False)  # a folder of tests may have its name
        return importlib.import_module(name)

    return script


@pytest.fixture
def benchmark(scripts, monkeypatch):
    found = scripts("attention")
    monkeypatch.setattr(found, "_flex", cache(lambda: flex_attention))
    return found


@pytest.mark.parametrize("name", ["dense", "merged", "flex"])
@pytest.mark.parametrize(("form", "length"), [("one_turn", 320), ("one_turn", 640), ("packed_row", 900)])
def test_output_and_gradients_are_those_of_segments(benchmark, name, form, length):
    layout = getattr(benchmark, form)(length)
    tensors = benchmark.inputs(length, torch.float32, "cpu", HEADS)
    if name == "flex":
        tensors = [x.detach() for x in tensors]  # it has no backward on a CPU
    ours, theirs = (
        benchmark.backend(layout, which, "cpu", HEADS, torch.float32)(*tensors) for which in ("segments", name)
    )
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-4)
    if name == "flex":
        return
    weight = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    for one, other in zip(*(torch.autograd.grad((out * weight).sum(), tensors) for out in (ours, theirs)), strict=True):
        torch.testing.assert_close(other, one, atol=1e-4, rtol=1e-4)


def test_a_steps_operations_are_counted_by_hand(scripts):
    """One layer of 640: four projections and three of SwiGLU; 6 operations a weight and token, 2 where it is frozen."""
    script = scripts("train_step")
    model, samples = script.build(layers=1), script.draw_samples(3, seed=0)
    tokens = sum(sample["labels"].numel() for sample in samples)
    learned = sum(int((sample["labels"] != -100).sum()) for sample in samples)
    layer, head = 4 * 640 * 640 + 3 * 640 * 1920, 640 * 32_000
    connector, encoder = 64 * 640 + 640 * 640, 4 * 64 * 64 + 2 * 64 * 64
    wanted = 6 * (layer * tokens + head * learned) + (6 * connector + 2 * encoder) * 144 * len(samples)
    assert script.useful_operations(model, samples) == wanted
