"""`aki compare`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from aki.commands.shared import read_recipe


@dataclass
class Compare:
    """Train rules from the same start and compare them. A second call goes on where the first was cut off."""

    recipe: Annotated[Positional[Path], arg(metavar="RECIPE")]
    """A YAML file; every field can be overridden: --sft.steps 100"""
    output: Path
    """Where models and the report go."""
    rules: tuple[str, ...] = ("causal", "mma")
    """The attention rules of SFT."""
    seeds: int = 1
    """How many, from the recipe's seed on."""
    parallel: int = 2
    """Trainings at a time; they share the cores."""

    def run(self, overrides: list[str]) -> None:
        from aki.evaluation.compare import run_comparison
        from aki.evaluation.report import three_questions, write_report

        recipe = read_recipe(self.recipe, overrides)
        results = run_comparison(recipe, self.output, self.rules, self.seeds, self.parallel)
        print("\n" + write_report(results, recipe.stage("sft").steps, self.output))
        best, picture = self.output / self.rules[-1], self.output / "scene.png"
        for question, said, truth in three_questions(recipe, best, picture):
            print(f"{question}  {said}" + ("" if said == truth else f"  (it is {truth})"))
        print(f"\nThe picture: {picture}. The report: {self.output}/report.md, curves.png. Ask more:")
        print(f'  aki chat {best} --image {picture} "how many digits are red?"')
