"""Processes that train together, two unless said, forked from the test's, so that nothing is imported again."""

from __future__ import annotations

import gc
import os
import socket
import sys
import traceback
import warnings
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType

RANKS = 2
_PATIENCE = 90
"""Seconds until processes that wait for each other are given up."""


def as_accelerators() -> None:
    """For the rest of this process let accelerate take CPUs for accelerators, on which alone it shards models."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
    if "deepspeed" in sys.modules:
        # An all-reduce over shared memory, which it would compile first.
        sys.modules["deepspeed"].ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # It calls what torch 2.13 deprecates.
        warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)


def on_two(run: Callable[[], Any], folder: Path, ranks: int = RANKS) -> list[Any]:
    """What `run` returns on each rank.

    Args:
        ranks: another number of processes.

    Raises:
        AssertionError: a process failed, with its traceback, or waits for ever.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = get_context("fork")
    files = [folder / f"rank-{rank}.pt" for rank in range(ranks)]
    processes = [context.Process(target=_rank, args=(run, rank, ranks, port, file)) for rank, file in enumerate(files)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(_PATIENCE)
    hung = [process for process in processes if process.is_alive()]
    for process in hung:
        process.kill()
        process.join()
    errors = [error for file in files if (error := file.with_suffix(".txt")).exists()]
    assert not errors, errors[0].read_text()
    assert not hung, f"{len(hung)} of {ranks} processes wait for ever."
    return [torch.load(file) for file in files]


def _rank(run: Callable[[], Any], rank: int, ranks: int, port: int, file: Path) -> None:
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks}
    os.environ |= {name: str(value) for name, value in where.items()}
    # What the fork took over stays, and looking through it takes seconds.
    gc.freeze()
    for state in (PartialState, AcceleratorState, GradientState):
        state._reset_state()
    try:
        dist.init_process_group("gloo")
        torch.save(run(), file)
        dist.barrier()
    except BaseException:
        file.with_suffix(".txt").write_text(traceback.format_exc())
        # The other one may wait for this one.
        os._exit(1)
    os._exit(0)
