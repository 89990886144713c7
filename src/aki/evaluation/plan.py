"""The cells of a comparison: rows by seeds, and the pre-trainings that they share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from aki.training.folder import relevant
from aki.training.recipe import Recipe, RecipeError, beyond_defaults, build, known

BASE = "causal"
"""The row that others are compared with, unless they say `against`."""
_SAID = ("title", "against")
"""What a row says of itself, and no recipe has."""
SEARCH_SEED = 1000
"""Added to the recipe's seed where learning rates are tried, so that no reported run has a part in the choice."""


@dataclass(frozen=True)
class Cell:
    """One training run of the comparison.

    Attributes:
        name: of its folder and its JSON file.
        row: the row that it belongs to; a pre-training belongs to the first that starts from it.
        recipe: its own, in full.
        start_from: the cell whose model it starts from; None starts from what the recipe does.
    """

    name: str
    row: str
    stage: str
    recipe: Recipe
    start_from: str | None = None

    @property
    def steps(self) -> int:
        return self.recipe.stage(self.stage).number_of_steps

    @property
    def work(self) -> int:
        """Samples by orders, for an estimate of how long it takes beside others."""
        stage = self.recipe.stage(self.stage)
        return stage.number_of_steps * stage.batch_size * stage.copies

    @property
    def fingerprint(self) -> str:
        """Of everything that decides its result."""
        decided = {"stage": self.stage, "recipe": relevant(self.recipe, self.stage)}
        return hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()[:16]


def rows_by_rule(rules: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A row a rule of SFT, as `Recipe.rows` has them.

    Raises:
        ValueError: a rule twice.
    """
    if len(set(rules)) < len(rules):
        raise ValueError(f"a comparison needs different rules, there are {', '.join(rules)}.")
    return {rule: {"sft": {"rule": rule}} for rule in rules}


def row_recipe(recipe: Recipe, row: Mapping[str, Any], seed: int, learning_rate: float | None = None) -> Recipe:
    """The recipe of a row's cells.

    Raises:
        RecipeError: the row names a field that no recipe has, or sets it to what it cannot be.
    """
    overrides = {name: value for name, value in row.items() if name not in _SAID}
    merged = build(Recipe, _merge(beyond_defaults(replace(recipe, rows={}, learning_rates=())), overrides), "")
    merged.seed = seed
    if learning_rate is not None:
        # The cosine ends at the same share of the rate that it starts from.
        sft = merged.stage("sft")
        lowest = sft.lowest_rate * learning_rate / sft.learning_rate
        merged.sft = replace(sft, learning_rate=learning_rate, min_learning_rate=lowest)
    return merged


def compared_with(recipe: Recipe, row: str) -> str | None:
    """The row whose seeds it is paired with: what its `against` says, `causal` if it says nothing; None for no row."""
    base = recipe.rows[row].get("against", BASE)
    return None if base == row or base not in recipe.rows else base


def plan(
    recipe: Recipe,
    rows: Iterable[str],
    seeds: Iterable[int],
    learning_rates: Mapping[str, float] | None = None,
    suffix: str = "",
) -> list[Cell]:
    """The cells of these rows of the recipe, each after the one that it starts from.

    Args:
        learning_rates: row -> that of its SFT; the recipe's where a row is not named.
        suffix: of the names of the SFT cells.
    """
    wanted, seeds = set(rows), list(seeds)
    for name in wanted:
        known("row", name, recipe.rows, "the recipe's rows")
    first_row = next(iter(recipe.rows))
    pretrainings: dict[str, Cell] = {}
    runs: list[Cell] = []
    # All rows, wanted or not, so that a pre-training is called the same whatever is asked for.
    for name, row in recipe.rows.items():
        for seed in seeds:
            own = row_recipe(recipe, row, seed, (learning_rates or {}).get(name))
            after = "" if seed == recipe.seed else f"-seed{seed}"
            start = None
            if "pretrain" in own.stages:
                label = "pretrain" if name == first_row else f"pretrain-{name}"
                first = Cell(label + after, name, "pretrain", own)
                start = pretrainings.setdefault(first.fingerprint, first).name
            if name in wanted:
                runs.append(Cell(f"{name}{suffix}{after}", name, "sft", own, start))
    used = {run.start_from for run in runs}
    return [cell for cell in pretrainings.values() if cell.name in used] + runs


def fast(recipe: Recipe) -> Recipe:
    """The same comparison with a few steps and questions a cell: whether it runs, not what comes of it."""
    few: dict[str, Any] = {
        "steps": 2,
        "epochs": None,
        "patience": 0,
        "batch_size": 2,
        "warmup_steps": 1,
        "eval_every": 0,
        "save_every": 0,
        "log_every": 1,
    }
    sizes: dict[str, Any] = {"eval_size": 12, "test_size": 24}
    rows = {name: _without(row, few | sizes) for name, row in recipe.rows.items()}
    stages: dict[str, Any] = {name: replace(recipe.stage(name), **few) for name in recipe.stages}
    return replace(
        recipe,
        **stages,
        data=replace(recipe.data, **sizes),
        learning_rates=recipe.learning_rates[:1],
        rows=rows,
    )


def check(recipe: Recipe) -> None:
    """
    Raises:
        RecipeError: a row is no recipe, or one that leaves nothing to compare it by; the row is named.
    """
    for name, row in recipe.rows.items():
        if not isinstance(row, dict):
            raise RecipeError(f"rows.{name} should be a mapping of fields, it is {row!r}.")
        if row.get("against") is not None:
            known(f"row rows.{name}.against:", row["against"], recipe.rows, "the recipe's rows")
        try:
            _check_measurable(row_recipe(recipe, row, recipe.seed))
        except ValueError as error:
            raise RecipeError(f"rows.{name}: {error}") from error


def _check_measurable(recipe: Recipe) -> None:
    sft = recipe.stage("sft")
    if sft.task != "question":
        raise RecipeError("rows are compared by their answers to questions: set sft.task to question.")
    if (sft.sources or sft.shards) and not recipe.data.held_out:
        raise RecipeError(
            "sft trains on data of its own and nothing is held out to compare by: add data.held_out, a list of sources "
            "in the form of sft.sources, with annotations that no row trains on."
        )


def _without(row: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {
        key: {inner: v for inner, v in value.items() if inner not in names}
        if key in ("data", "pretrain", "sft")
        else value
        for key, value in row.items()
    }


def _merge(values: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(values)
    for name, value in overrides.items():
        below = merged.get(name)
        merged[name] = _merge(below, value) if isinstance(value, dict) and isinstance(below, dict) else value
    return merged
