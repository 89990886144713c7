"""`aki compare`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from aki.commands.shared import TakesPlugins, read_recipe


@dataclass
class Compare(TakesPlugins):
    """Train the rows of a recipe from the same starts and compare them. A second call goes on where the first ended."""

    recipe: Annotated[Positional[Path], arg(metavar="RECIPE")]
    """A YAML file, or the name of one of aki's own recipes; every field can be overridden: --sft.steps 100"""
    output: Path
    """Where models, the results of finished cells (in cells/) and the report go."""
    rules: tuple[str, ...] = ()
    """Where the recipe has no rows: the attention rules of SFT, a row each; causal and mma if absent."""
    rows: tuple[str, ...] = ()
    """Which of the recipe's rows; all if absent."""
    seeds: int = 1
    """How many, from the recipe's seed on."""
    parallel: int = 2
    """Trainings at a time; they share the cores."""
    fast: bool = False
    """A few steps a cell: shows that everything runs, measures nothing."""

    def run(self, overrides: list[str]) -> None:
        from aki.evaluation.compare import run_comparison
        from aki.evaluation.plan import fast, rows_by_rule
        from aki.evaluation.report import three_questions, write_report
        from aki.models.adapters import has_model
        from aki.training.data import counted

        recipe = read_recipe(self.recipe, overrides)
        recipe = recipe if self.fast else counted(recipe, recipe.stages)
        if recipe.rows and self.rules:
            raise ValueError(f"{self.recipe} has rows of its own: choose among them with --rows, without --rules.")
        recipe.rows = recipe.rows or rows_by_rule(self.rules or ("causal", "mma"))
        recipe = fast(recipe) if self.fast else recipe
        rows = self.rows or tuple(recipe.rows)
        comparison = run_comparison(recipe, self.output, rows, self.seeds, self.parallel)
        print("\n" + write_report(comparison, self.output))
        print(f"The report: {self.output}/report.md")
        best, picture = self.output / rows[-1], self.output / "scene.png"
        if not has_model(best):
            return
        if recipe.data.held_out:
            print(f"Ask it: aki chat {best} --image PICTURE QUESTION")
        else:
            for question, said, truth in three_questions(recipe, best, picture):
                print(f"{question}  {said}" + ("" if said == truth else f"  (it is {truth})"))
            print(f"\nThe picture: {picture}. Ask more:")
            print(f'  aki chat {best} --image {picture} "how many digits are red?"')
