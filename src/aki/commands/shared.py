"""What several commands need."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro
from tyro.conf import AvoidSubcommands, UseAppendAction

from aki.training.recipe import Recipe, load_recipe
from aki.training.recipe.describe import fields_of


@dataclass(kw_only=True)
class TakesPlugins:
    """What every command takes that opens a model, a rule or data."""

    plugin: UseAppendAction[tuple[Path, ...]] = ()
    """A Python file with a rule, connector or source of your own (CONTRIBUTING.md); --plugin again for one more."""


def read_recipe(path: Path, overrides: list[str]) -> Recipe:
    """The recipe in a YAML file with the fields that the command line sets."""
    recipe = load_recipe(path)
    if not overrides:
        return recipe
    # A stage that is there is a group of fields, not a choice between a stage and none.
    return tyro.cli(
        Recipe, args=as_flags(overrides), default=recipe, prog=f"aki ... {path}", config=(AvoidSubcommands,)
    )


def as_flags(arguments: list[str]) -> list[str]:
    """`--sft.packing True` as `--sft.packing`, and `--sft.packing False` as `--sft.no-packing`: tyro's own form."""
    switches = {one.name.replace("_", "-") for one in fields_of(Recipe) if one.kind == "bool"}
    written: list[str] = []
    for one in arguments:
        last, joined, value = one.partition("=") if one.startswith("--") else (written[-1] if written else "", " ", one)
        name = last.removeprefix("--").replace("_", "-")
        if joined and name in switches and value.lower() in ("true", "false"):
            group, dot, field = name.rpartition(".")
            said = f"--{name}" if value.lower() == "true" else f"--{group}{dot}no-{field}"
            written = [*(written if joined == "=" else written[:-1]), said]
        else:
            written.append(one)
    return written
