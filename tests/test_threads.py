"""How many threads: issue 12, entry 24."""

import os

import pytest
import torch

from aki import threads
from aki.cli import main
from aki.evaluation import cells


@pytest.fixture(autouse=True)
def sixteen_cores(monkeypatch):
    """Sixteen, of which the affinity leaves twelve, without a quota; nothing is set by the user."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(12)), raising=False)
    monkeypatch.setattr(threads, "_quotas", lambda groups, root: iter(()))


@pytest.fixture
def torchs(monkeypatch):
    """What torch is told; it starts with sixteen."""
    told = [16]
    monkeypatch.setattr(torch, "get_num_threads", lambda: told[-1])
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    return told


def test_24_affinity_is_shared_by_what_runs_side_by_side():
    assert [threads.threads(parallel) for parallel in (1, 2, 5, 50)] == [12, 6, 2, 1]


@pytest.mark.parametrize(("quota", "one", "two"), [(0.5, 1, 1), (1.5, 1, 1), (4.0, 4, 2), (40.0, 12, 6)])
def test_24_a_quota_is_never_passed_and_half_a_core_is_one_thread(monkeypatch, quota, one, two):
    monkeypatch.setattr(threads, "_quotas", lambda groups, root: iter([quota]))
    assert (threads.threads(1), threads.threads(2)) == (one, two)


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_24_the_users_setting_wins(monkeypatch, torchs, name):
    monkeypatch.setenv(name, "3")
    assert threads.threads(2) is None
    threads.use_threads(2)
    assert torchs == [16]


def test_24_every_command_and_every_cell_asks(monkeypatch, torchs, tmp_path):
    with pytest.raises(SystemExit):
        main(["convert", str(tmp_path / "nothing"), str(tmp_path / "out")])
    assert torchs == [16, 12]
    # What a process of cells does first, but for its log and the watch over its parent.
    monkeypatch.setattr(os, "dup2", lambda one, two: None)
    monkeypatch.setattr(cells, "Thread", lambda **options: type("Never", (), {"start": lambda self: None})())
    monkeypatch.setattr(cells.multiprocessing, "parent_process", lambda: object())
    cells._start(None, tmp_path / "log.txt", 3)
    assert torchs == [16, 12, 4]


@pytest.mark.parametrize(
    ("groups", "files", "cores"),
    [
        ("0::/\n", {"cpu.max": "50000 100000\n"}, [0.5]),
        ("0::/user/job\n", {"user/job/cpu.max": "max 100000\n", "user/cpu.max": "300000 100000\n"}, [3.0]),
        ("0::/\n", {}, []),
        (
            "5:memory:/job\n4:cpu,cpuacct:/job\n0::/\n",
            {"cpu/job/cpu.cfs_quota_us": "150000\n", "cpu/job/cpu.cfs_period_us": "100000\n"},
            [1.5],
        ),
        # In a container the path is the host's, and its own group is the root of what is mounted.
        (
            "1:cpu:/docker/abc\n",
            {"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"},
            [0.5],
        ),
        ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, []),
        ("rubbish\n", {"cpu.max": "rubbish"}, []),
    ],
)
def test_24_quotas_of_both_versions_of_control_groups(tmp_path, monkeypatch, groups, files, cores):
    monkeypatch.undo()
    root = tmp_path / "cgroup"
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (tmp_path / "groups").write_text(groups)
    assert list(threads._quotas(tmp_path / "groups", root)) == cores
