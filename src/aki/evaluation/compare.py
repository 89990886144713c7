"""Train several rules from the same start, side by side, and report what each learned.

One pre-training a seed, then one SFT run a rule from it, with equal steps, data order and starting weights. Each cell
is a process of its own (`aki train`), so that two run at a time, a kill costs one checkpoint's distance, and a finished
cell is never trained again.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import queue
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from tqdm.auto import tqdm

from aki.attention import get_rule
from aki.training.recipe import Recipe
from aki.training.stages import RESULT


@dataclass(frozen=True)
class Cell:
    """One training run of the comparison; `start_from` names the cell whose model it starts from."""

    name: str
    stage: str
    rule: str
    seed: int
    steps: int
    start_from: str | None = None


class CellError(RuntimeError):
    """A cell's process failed."""


def plan(recipe: Recipe, rules: Sequence[str], seeds: int) -> tuple[list[Cell], list[Cell]]:
    """The pre-trainings, and the SFT runs that start from them."""
    first, second = [], []
    for seed in range(recipe.seed, recipe.seed + seeds):
        suffix = "" if seed == recipe.seed else f"-seed{seed}"
        start = Cell(
            f"pretrain{suffix}", "pretrain", recipe.stage("pretrain").rule, seed, recipe.stage("pretrain").steps
        )
        first.append(start)
        second += [Cell(f"{rule}{suffix}", "sft", rule, seed, recipe.stage("sft").steps, start.name) for rule in rules]
    return first, second


def run_comparison(
    recipe: Recipe, output: Path, rules: Sequence[str], seeds: int, parallel: int
) -> dict[str, list[dict[str, Any]]]:
    """Train what is not trained yet, with progress; returns rule -> one result a seed.

    Args:
        parallel: cells at a time; they share the machine's cores.

    Raises:
        ValueError: no such rule, or one twice; no seeds.
        CellError: a cell failed; its log is named.
    """
    for rule in rules:
        get_rule(rule)
    if len(set(rules)) < len(rules) or seeds < 1 or parallel < 1:
        raise ValueError("a comparison needs different rules, at least one seed, and at least one training at a time.")
    output.mkdir(parents=True, exist_ok=True)
    pretrainings, runs = plan(recipe, rules, seeds)
    total = sum(cell.steps for cell in pretrainings + runs)
    free_lines: queue.SimpleQueue[int] = queue.SimpleQueue()
    for line in range(1, parallel + 1):
        free_lines.put(line)
    futures: dict[str, Future[None]] = {}

    def run(cell: Cell, rivals: int) -> None:
        if cell.start_from:
            futures[cell.start_from].result()
        line = free_lines.get()
        threads = max(1, (os.cpu_count() or 1) // min(parallel, rivals))
        try:
            _run_cell(recipe, output, cell, threads, line, bar)
        finally:
            free_lines.put(line)

    with (
        tqdm(total=total, desc="all", unit="step", position=0, dynamic_ncols=True) as bar,
        ThreadPoolExecutor(parallel) as pool,
    ):
        try:
            # What others start from is queued first, so that nobody waits for a cell that has no worker.
            for cells in (pretrainings, runs):
                futures |= {cell.name: pool.submit(run, cell, len(cells)) for cell in cells}
            for future in futures.values():
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return {rule: [_read(output, cell) for cell in runs if cell.rule == rule] for rule in rules}


def _run_cell(recipe: Recipe, output: Path, cell: Cell, threads: int, line: int, bar: tqdm) -> None:
    folder = output / cell.name
    folder.mkdir(exist_ok=True)
    of_cell = copy.deepcopy(recipe)
    of_cell.seed, of_cell.stage(cell.stage).rule = cell.seed, cell.rule
    recipe_file = folder / "recipe.yaml"
    recipe_file.write_text(yaml.safe_dump(_plain(of_cell), sort_keys=False))
    command = [sys.executable, "-m", "aki", "train", str(recipe_file), "--stage", cell.stage, "--output", str(folder)]
    command += ["--resume", "--progress", "json"]
    if cell.start_from:
        command += ["--start-from", str(output / cell.start_from)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    errors = folder / "errors.txt"
    done = 0
    with (
        errors.open("w") as error_file,
        tqdm(total=cell.steps, desc=cell.name, unit="step", position=line, leave=False, dynamic_ncols=True) as own,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=error_file, text=True, env=environment) as process,
    ):
        assert process.stdout is not None
        try:
            for text in process.stdout:
                if not text.startswith("{"):
                    continue
                news = json.loads(text)
                own.update(news["step"] - done)
                own.set_postfix({name: value for name, value in news.items() if name not in ("step", "of")})
                bar.update(news["step"] - done)
                done = news["step"]
        except BaseException:
            process.terminate()
            raise
    bar.update(cell.steps - done)
    if process.returncode:
        said = errors.read_text().strip().splitlines() or [f"exit code {process.returncode}"]
        raise CellError(f"the cell {cell.name} failed: {said[-1]} (all of it: {errors})")


def _read(output: Path, cell: Cell) -> dict[str, Any]:
    return json.loads((output / cell.name / RESULT).read_text()) | {"seed": cell.seed, "cell": cell.name}


def _plain(recipe: Recipe) -> Any:
    return json.loads(json.dumps(dataclasses.asdict(recipe)))
