"""`aki recipe`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import OmitArgPrefixes, Positional, arg, subcommand


@dataclass
class Init:
    """Write a complete recipe to fill in: what has to be said, and every other field with its default as a comment."""

    file: Annotated[Positional[Path], arg(metavar="FILE")] = Path("recipe.yaml")
    """Where it goes; a file that is there is not written over."""
    purpose: Annotated[Literal["lora", "sft", "compare", "pretrain"], arg(name="for")] = "lora"
    """An adapter, all of a model, rules compared, or captions first."""

    def run(self) -> None:
        from aki.training.recipe.starters import starter

        try:
            with self.file.open("x", encoding="utf-8") as file:
                file.write(starter(self.purpose))
        except FileExistsError:
            raise ValueError(f"{self.file} is there already: name another file, or delete it.") from None
        print(f"{self.file}: name your model and data in it, then aki data check {self.file}")


@dataclass
class Fields:
    """Print every field that a recipe may have: its type, its default, what it means."""

    markdown: bool = False
    """As the page docs/recipe.md."""

    def run(self) -> None:
        from aki.training.recipe.describe import page, table

        print(page() if self.markdown else table(), end="" if self.markdown else "\n")


@dataclass
class Recipe:
    """Begin a recipe, or look up what one may hold."""

    action: OmitArgPrefixes[Annotated[Init, subcommand("init")] | Annotated[Fields, subcommand("fields")]]

    def run(self, overrides: list[str]) -> None:
        self.action.run()
