"""What several commands need."""

from __future__ import annotations

from pathlib import Path

import tyro
from tyro.conf import AvoidSubcommands

from aki.training.recipe import Recipe, load_recipe


def read_recipe(path: Path, overrides: list[str]) -> Recipe:
    """The recipe in a YAML file with the fields that the command line sets."""
    recipe = load_recipe(path)
    if not overrides:
        return recipe
    # A stage that is there is a group of fields, not a choice between a stage and none.
    return tyro.cli(Recipe, args=overrides, default=recipe, prog=f"aki ... {path}", config=(AvoidSubcommands,))
