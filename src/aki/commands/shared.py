"""What several commands need."""

from __future__ import annotations

from pathlib import Path

import tyro

from aki.training.recipe import Recipe, load_recipe


def read_recipe(path: Path, overrides: list[str]) -> Recipe:
    """The recipe in a YAML file with the fields that the command line sets."""
    recipe = load_recipe(path)
    return tyro.cli(Recipe, args=overrides, default=recipe, prog=f"aki ... {path}") if overrides else recipe
