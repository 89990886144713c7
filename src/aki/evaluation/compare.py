"""Train the rows of a recipe from the same starts, side by side, and keep what each learned as small JSON files.

Rows of one seed share the pre-training wherever what decides it is the same; steps, data order and starting weights are
equal then. A cell whose JSON file is there is never trained again, nor is a pre-training from which nothing starts any
more, so a report is made again from those files alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aki.evaluation.cells import run_cells
from aki.evaluation.plan import SEARCH_SEED, Cell, check, plan
from aki.evaluation.steps import Steps, load_steps, time_missing
from aki.files import alone, write_json
from aki.models.adapters import has_model
from aki.training.folder import RunError
from aki.training.recipe import Recipe

CELLS = "cells"
_KEPT = (
    "test",
    "validation",
    "baselines",
    "held_out",
    "curve",
    "parameters",
    "tokens",
    "flops",
    "seconds",
    "guard_seconds",
)

Run = dict[str, Any]


@dataclass
class Comparison:
    """What was measured.

    Attributes:
        recipe: with its rows.
        results: row -> one result a seed, in order of the seeds: what `run_stage` measured, and `seed`, `cell`,
            `learning_rate`, `pretrain` (the result of the pre-training that it started from, None where there is none).
        searched: row -> learning rate -> accuracy on the validation questions of the seed kept for that.
        steps: how long a training step of each row takes; None where nobody has measured it.
    """

    recipe: Recipe
    results: dict[str, list[Run]]
    searched: dict[str, dict[float, float]] = field(default_factory=dict)
    steps: Steps | None = None


def run_comparison(recipe: Recipe, output: Path, rows: Sequence[str], seeds: int, parallel: int) -> Comparison:
    """Train what is not trained yet, with progress.

    Args:
        rows: of the recipe; seeds beyond these that are finished in the folder are reported too.
        parallel: cells at a time; they share the machine's cores.

    Raises:
        RecipeError: a row is no recipe, or there is no such row.
        ValueError: a row twice; no seeds.
        CellError: a cell failed; its log is named.
        RunError: the folder holds a cell of another recipe.
        InUseError: another process compares there.
    """
    if len(set(rows)) < len(rows) or seeds < 1 or parallel < 1:
        raise ValueError("a comparison needs different rows, at least one seed, and at least one training at a time.")
    check(recipe)
    with alone(output / CELLS / "lock", f"the output folder {output}"):
        return _compare(recipe, output, rows, seeds, parallel)


def _compare(recipe: Recipe, output: Path, rows: Sequence[str], seeds: int, parallel: int) -> Comparison:
    _train_missing(_search_cells(recipe, rows), output, parallel)
    rates = _best(_searched(recipe, output, rows))
    _train_missing(plan(recipe, rows, range(recipe.seed, recipe.seed + seeds), rates), output, parallel)
    time_missing(recipe, output, rows)
    return load_comparison(recipe, output, rows)


def load_comparison(recipe: Recipe, output: Path, rows: Sequence[str]) -> Comparison:
    """Everything of these rows that is finished in the folder, any number of seeds; trains nothing."""
    searched = _searched(recipe, output, rows)
    rates = _best(searched)
    kept = [_content(file) for file in sorted((output / CELLS).glob("*.json"))]
    results: dict[str, list[Run]] = {}
    for row in rows:
        seeds = {one["seed"] for one in kept if one["row"] == row and one["stage"] == "sft"} - {_search_seed(recipe)}
        cells = {cell.name: cell for cell in plan(recipe, [row], sorted(seeds), rates)}
        results[row] = [
            (_read(output, cell) or {}) | {"pretrain": cell.start_from and _read(output, cells[cell.start_from])}
            for cell in cells.values()
            if cell.stage == "sft"
        ]
    return Comparison(recipe, results, searched, load_steps(recipe, output))


def _search_seed(recipe: Recipe) -> int:
    return recipe.seed + SEARCH_SEED


def _search_cells(recipe: Recipe, rows: Sequence[str]) -> list[Cell]:
    """Each row at each learning rate, where the recipe names some."""
    cells = [
        cell
        for rate in recipe.learning_rates
        for cell in plan(recipe, rows, [_search_seed(recipe)], dict.fromkeys(rows, rate), f"-lr{rate:g}")
    ]
    return list({cell.name: cell for cell in cells}.values())


def _searched(recipe: Recipe, output: Path, rows: Sequence[str]) -> dict[str, dict[float, float]]:
    """Row -> learning rate -> validation accuracy."""
    found: dict[str, dict[float, float]] = {}
    for cell in _search_cells(recipe, rows):
        run = _read(output, cell)
        if cell.stage == "sft" and run is not None:
            found.setdefault(cell.row, {})[run["learning_rate"]] = run["validation"]["accuracy"]
    return found


def _best(searched: dict[str, dict[float, float]]) -> dict[str, float]:
    return {row: max(by_rate, key=lambda rate: by_rate[rate]) for row, by_rate in searched.items()}


def _train_missing(cells: Sequence[Cell], output: Path, parallel: int) -> None:
    missing = [cell for cell in cells if cell.stage == "sft" and _read(output, cell) is None]
    starts = {cell.start_from for cell in missing}
    # A pre-training's model may be gone although its result is kept.
    needed = [
        cell for cell in cells if cell.name in starts and not (has_model(output / cell.name) and _read(output, cell))
    ]

    def keep(cell: Cell, result: Run) -> None:
        stage = cell.recipe.stage(cell.stage)
        about = {"row": cell.row, "stage": cell.stage, "seed": cell.recipe.seed, "fingerprint": cell.fingerprint}
        about |= {"start_from": cell.start_from, "learning_rate": stage.learning_rate, "steps": stage.steps}
        write_json(_file(output, cell), about | {name: result[name] for name in _KEPT if name in result})

    # Seed by seed: what is stopped leaves whole pairs, and rows of one seed are shown the same batches, which a process
    # makes once.
    in_order = sorted(needed + missing, key=lambda cell: (cell.recipe.seed, cell.stage == "sft"))
    run_cells(in_order, output, parallel, keep)


def _file(output: Path, cell: Cell) -> Path:
    return output / CELLS / f"{cell.name}.json"


def _content(file: Path) -> Run:
    return json.loads(file.read_text()) | {"cell": file.stem}


def _read(output: Path, cell: Cell) -> Run | None:
    """What was kept of a cell; None if it is not finished.

    Raises:
        RunError: what was kept is of another recipe.
    """
    file = _file(output, cell)
    if not file.exists():
        return None
    content = _content(file)
    if content["fingerprint"] != cell.fingerprint:
        raise RunError(
            f"{file} was trained by another recipe: choose another --output, or delete it (and {output / cell.name})."
        )
    return content
