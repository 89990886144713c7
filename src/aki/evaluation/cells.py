"""Cells trained side by side, each in one of a few processes that stay, with progress."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from threading import Thread
from typing import Any

from tqdm.auto import tqdm

from aki.evaluation.plan import Cell
from aki.threads import use_threads

LOG = "log.txt"


class CellError(RuntimeError):
    """A cell could not be trained."""


def run_cells(cells: Sequence[Cell], output: Path, parallel: int, finished: Any) -> None:
    """Train cells, each as soon as the one that it starts from is there.

    Args:
        cells: those that others start from first.
        output: a folder a cell, and a log.
        parallel: cells at a time; they share the machine's cores.
        finished: called with a cell and its result.

    Raises:
        CellError: a cell failed; its reason, and the log.
    """
    if not cells:
        return
    parallel = min(parallel, len(cells))
    context = multiprocessing.get_context("spawn")
    news = context.SimpleQueue()
    others = set(multiprocessing.active_children())
    waiting = list(cells)
    running: dict[Future, Cell] = {}
    pool = ProcessPoolExecutor(parallel, context, _start, (news, output / LOG, parallel))
    try:
        with Bars(cells) as bars:
            while waiting or running:
                unfinished = {cell.name for cell in [*waiting, *running.values()]}
                ready = [cell for cell in waiting if cell.start_from not in unfinished]
                for cell in ready[: parallel - len(running)]:
                    waiting.remove(cell)
                    running[pool.submit(_train, cell, output)] = cell
                done, _ = wait(running, timeout=0.3, return_when=FIRST_COMPLETED)
                while not news.empty():
                    bars.show(*news.get())
                for future in done:
                    cell = running.pop(future)
                    finished(cell, _result(future, cell, output))
                    bars.close(cell)
        pool.shutdown()
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        raise


class Bars:
    """A bar for all and one for each cell that runs: which, which step, and when the whole will be done."""

    def __init__(self, cells: Sequence[Cell]):
        self.cells = {cell.name: cell for cell in cells}
        self.steps = dict.fromkeys(self.cells, 0)
        self.total = sum(cell.work for cell in cells)
        self.own: dict[str, tqdm] = {}
        self.started = time.time()

    def __enter__(self) -> Bars:
        self.all = tqdm(total=len(self.cells), desc="all", unit="cell", position=0, dynamic_ncols=True)
        return self

    def __exit__(self, *error: object) -> None:
        for bar in [*self.own.values(), self.all]:
            bar.close()

    def show(self, name: str, news: dict[str, Any]) -> None:
        cell = self.cells[name]
        if name not in self.own:
            taken = {-bar.pos for bar in self.own.values()}
            line = next(i for i in range(1, len(self.cells) + 1) if i not in taken)
            self.own[name] = tqdm(
                total=cell.steps, desc=name, unit="step", position=line, leave=False, dynamic_ncols=True
            )
        bar = self.own[name]
        bar.update(news["step"] - bar.n)
        bar.set_postfix({key: value for key, value in news.items() if key not in ("step", "of")})
        self.steps[name] = news["step"]
        self._estimate()

    def close(self, cell: Cell) -> None:
        if cell.name in self.own:
            self.own.pop(cell.name).close()
        self.steps[cell.name] = cell.steps
        self.all.update()
        self._estimate()

    def _estimate(self) -> None:
        done = sum(self.steps[name] / cell.steps * cell.work for name, cell in self.cells.items())
        if done:
            end = self.started + (time.time() - self.started) * self.total / done
            self.all.set_postfix_str(
                f"{done / self.total:.0%}, done about {time.strftime('%H:%M:%S', time.localtime(end))}"
            )


def _result(future: Future, cell: Cell, output: Path) -> dict[str, Any]:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise CellError(f"the process of the cell {cell.name} died (out of memory?); see {output / LOG}.") from error
    except Exception as error:
        raise CellError(f"the cell {cell.name} failed: {error} (all of it: {output / LOG})") from error


def _start(news: Any, log: Path, parallel: int) -> None:
    """What a process does before its first cell: its words go to the log, and it ends when its parent does."""
    global _news
    _news = news
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    parent = multiprocessing.parent_process()
    assert parent is not None
    Thread(target=lambda: (wait_for([parent.sentinel]), os._exit(1)), daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    use_threads(parallel)


_news: Any = None
_memory: dict = {}
"""The batches that the cells of this process were shown: rows of one seed are shown the same."""


def _train(cell: Cell, output: Path) -> dict[str, Any]:
    from aki.training.stages import Job, run_stage

    start = output / cell.start_from if cell.start_from else None
    if start is None and cell.recipe.start_from:
        start = Path(cell.recipe.start_from)
    print(f"{time.strftime('%H:%M:%S')} {cell.name}", flush=True)
    try:
        return run_stage(
            Job(
                cell.recipe,
                cell.stage,
                output / cell.name,
                start,
                resume=True,
                title=cell.name,
                report=lambda news: _news.put((cell.name, news)),
                memory=None if cell.recipe.workers else _memory,
            )
        )
    except BaseException:
        traceback.print_exc()
        raise
