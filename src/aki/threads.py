"""How many threads to compute with: what the user set, else the cores that this process may use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_SET_BY_USER = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def threads(parallel: int = 1) -> int | None:
    """For each of so many processes side by side, at least 1; None where the user's environment says how many."""
    if any(os.environ.get(name) for name in _SET_BY_USER):
        return None
    return max(1, int(usable_cores() / parallel))


def use_threads(parallel: int = 1) -> None:
    """Let torch compute with no more than `threads`."""
    import torch

    number = threads(parallel)
    if number is not None and number < torch.get_num_threads():
        torch.set_num_threads(number)


def usable_cores() -> float:
    """The cores of this process's affinity, or less where its control groups' quota of CPU time is less."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min([float(cores), *_quotas(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))])


def _quotas(groups: Path, root: Path) -> Iterator[float]:
    """The quota of each control group that the process is in, version 1 or 2, and of those above it, in cores.

    Args:
        groups: `/proc/self/cgroup`, whose lines are `number:controllers:path`.
        root: where control groups are mounted.
    """
    try:
        lines = [line.split(":", 2) for line in groups.read_text().splitlines()]
    except OSError:
        return
    for _, controllers, path in (line for line in lines if len(line) == 3):
        if controllers and "cpu" not in controllers.split(","):
            continue
        group = (root / "cpu" if controllers else root) / path.strip("/")
        for folder in (group, *group.parents):
            if folder == root.parent:
                break
            yield from _quota(folder)


def _quota(folder: Path) -> Iterator[float]:
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            quota, period = ((folder / name).read_text().strip() for name in names)
        if quota not in ("max", "-1"):
            yield int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):  # no limit is set here, or the file cannot be read
        return
