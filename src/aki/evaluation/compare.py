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
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from tqdm.auto import tqdm

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


def plan(recipe: Recipe, rules: Sequence[str], seeds: int) -> list[list[Cell]]:
    """The cells in waves: within a wave nothing waits for anything."""
    first, second = [], []
    for seed in range(recipe.seed, recipe.seed + seeds):
        suffix = "" if seed == recipe.seed else f"-seed{seed}"
        start = Cell(f"pretrain{suffix}", "pretrain", recipe.pretrain.rule, seed, recipe.pretrain.steps)
        first.append(start)
        second += [Cell(f"{rule}{suffix}", "sft", rule, seed, recipe.sft.steps, start.name) for rule in rules]
    return [first, second]


def run_comparison(
    recipe: Recipe, output: Path, rules: Sequence[str], seeds: int, parallel: int
) -> dict[str, list[dict[str, Any]]]:
    """Train what is not trained yet, with progress; returns rule -> one result a seed.

    Args:
        parallel: cells at a time; they share the machine's cores.

    Raises:
        CellError: a cell failed; its log is named.
    """
    output.mkdir(parents=True, exist_ok=True)
    waves = plan(recipe, rules, seeds)
    with tqdm(
        total=sum(c.steps for w in waves for c in w), desc="all", unit="step", position=0, dynamic_ncols=True
    ) as bar:
        for wave in waves:
            _run_wave(recipe, output, wave, min(parallel, len(wave)), bar)
    return {rule: [_read(output, cell) for cell in waves[1] if cell.rule == rule] for rule in rules}


def _run_wave(recipe: Recipe, output: Path, wave: list[Cell], parallel: int, bar: tqdm) -> None:
    threads = max(1, (os.cpu_count() or 1) // parallel)
    slots = list(range(1, parallel + 1))
    lock = threading.Lock()

    def run(cell: Cell) -> None:
        with lock:
            slot = slots.pop(0)
        try:
            _run_cell(recipe, output, cell, threads, slot, bar)
        finally:
            with lock:
                slots.append(slot)

    with ThreadPoolExecutor(parallel) as pool:
        for future in [pool.submit(run, cell) for cell in wave]:
            future.result()


def _run_cell(recipe: Recipe, output: Path, cell: Cell, threads: int, slot: int, bar: tqdm) -> None:
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
        tqdm(total=cell.steps, desc=cell.name, unit="step", position=slot, leave=False, dynamic_ncols=True) as own,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=error_file, text=True, env=environment) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if not line.startswith("{"):
                    continue
                news = json.loads(line)
                own.update(news["step"] - done)
                own.set_postfix({name: value for name, value in news.items() if name not in ("step", "of")})
                bar.update(news["step"] - done)
                done = news["step"]
        except BaseException:
            process.terminate()
            raise
    bar.update(cell.steps - done)
    if process.returncode:
        raise CellError(
            f"the cell {cell.name} failed: {errors.read_text().strip().splitlines()[-1]} (all of it: {errors})"
        )


def _read(output: Path, cell: Cell) -> dict[str, Any]:
    return json.loads((output / cell.name / RESULT).read_text()) | {"seed": cell.seed, "cell": cell.name}


def _plain(recipe: Recipe) -> Any:
    return json.loads(json.dumps(dataclasses.asdict(recipe)))
