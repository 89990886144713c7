"""`aki train`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from aki.commands.shared import read_recipe
from aki.training.recipe import STAGES


@dataclass
class Train:
    """Train the stages of a recipe. Every field of the recipe can be overridden: --sft.steps 100"""

    recipe: Annotated[Positional[Path], arg(metavar="RECIPE")]
    """A YAML file."""
    output: Path | None = None
    """Where the models go, runs/NAME if absent."""
    stage: Literal["all", "pretrain", "sft"] = "all"
    """All go to folders of their own in --output, one alone to --output itself."""
    start_from: Path | None = None
    """A folder with the model that the first stage starts from."""
    resume: bool = False
    """Go on from the last whole checkpoint."""
    progress: Literal["bar", "json"] = "bar"
    """A bar for a person, or JSON lines on standard output for a program."""

    def run(self, overrides: list[str]) -> None:
        from aki.training.stages import Job, run_stage

        recipe = read_recipe(self.recipe, overrides)
        output = self.output or Path("runs") / recipe.name
        start_from = self.start_from
        for name in STAGES if self.stage == "all" else (self.stage,):
            folder = output / name if self.stage == "all" else output
            stage = recipe.stage(name)
            if self.progress == "bar":
                start = start_from or "random weights"
                print(f"{name}: {stage.steps} steps of {stage.batch_size}, rule {stage.rule}, from {start} to {folder}")
            result = run_stage(Job(recipe, name, folder, start_from, self.resume, name, self.progress == "json"))
            if self.progress == "bar":
                scores = [f"  {skill} {value:.3f}" for skill, value in result.get("test", {}).items()]
                print(*scores, f"  saved in {folder}", sep="\n")
            start_from = folder
