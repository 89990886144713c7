"""The loss is weighted by token over the global batch: the same weights come out however it is dealt out."""

import subprocess
import sys
from pathlib import Path

import global_batch
import pytest
import torch

RANKS = 2


@pytest.fixture(scope="module")
def alone():
    return global_batch.train()


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], atol=2e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_training_changes_the_weights(alone):
    before = dict(global_batch.build().named_parameters())
    moved = [name for name, weight in alone.items() if (weight - before[name]).abs().max() > 1e-3]
    assert any("language_model" in name for name in moved)
    assert any("connector" in name for name in moved)


@pytest.mark.parametrize(
    "dealt",
    [
        {"batch": 2, "accumulation": 2},
        {"batch": 1, "accumulation": 4},
        {"samples_a_row": 4, "batch": 1},
        {"samples_a_row": 2, "batch": 1, "accumulation": 2},
    ],
    ids=["accumulated", "one by one", "packed", "packed and accumulated"],
)
def test_accumulation_and_packing(alone, dealt):
    assert_same(global_batch.train(**dealt), alone)


def on_two_ranks(what: str, folder: Path) -> dict[str, torch.Tensor]:
    file = folder / "result.pt"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    done = subprocess.run([*torchrun, global_batch.__file__, what, str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(file)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["ranks", "ranks and accumulation", "ranks and packing"])
def test_ranks(alone, tmp_path, what):
    assert_same(on_two_ranks(what, tmp_path), alone)


@pytest.mark.slow
def test_fully_sharded(tmp_path):
    """FSDP2 with attention by segments, documents packed: loss and gradients of one process."""
    assert_same(on_two_ranks("fsdp", tmp_path), global_batch.sharded_step())
