"""The command `aki`: it parses and calls."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional, arg

from aki.training.recipe import STAGES, Recipe, RecipeError, load_recipe


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

        recipe = _recipe(self.recipe, overrides)
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

        recipe = _recipe(self.recipe, overrides)
        results = run_comparison(recipe, self.output, self.rules, self.seeds, self.parallel)
        print("\n" + write_report(results, recipe.sft.steps, self.output))
        best, picture = self.output / self.rules[-1], self.output / "scene.png"
        for question, said, truth in three_questions(recipe, best, picture):
            print(f"{question}  {said}" + ("" if said == truth else f"  (it is {truth})"))
        print(f"\nThe picture: {picture}. The report: {self.output}/report.md, curves.png. Ask more:")
        print(f'  aki chat {best} --image {picture} "how many digits are red?"')


@dataclass
class Chat:
    """Ask a model about a picture."""

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """A folder or a hub id."""
    question: Annotated[Positional[str | None], arg(metavar="QUESTION")] = None
    """Read from standard input if absent."""
    image: str | None = None
    """A path or URL."""
    rule: str | None = None
    """Another attention rule than the model's."""
    max_new_tokens: int = 128

    def run(self, overrides: list[str]) -> None:
        from aki.apps.chat import answer, load

        question = self.question if self.question is not None else sys.stdin.read()
        model, processor = load(self.model)
        answer(
            model,
            processor,
            question,
            self.image,
            max_new_tokens=self.max_new_tokens,
            attention_rule=self.rule,
            emit=lambda piece: print(piece, end="", flush=True),
        )
        print()


@dataclass
class Mask:
    """Draw which token sees which, beside causal attention."""

    rule: str = "mma"
    picture: Path = Path("mask.png")

    def run(self, overrides: list[str]) -> None:
        from aki.apps.pictures import draw_masks

        rules = list(dict.fromkeys(["causal", self.rule]))
        for name, (pairs, opened) in draw_masks(rules, self.picture).items():
            print(f"{name}: {pairs} pairs, {opened} beyond causal")
        print(f"drawn in {self.picture}")


def main(arguments: list[str] | None = None) -> None:
    """Run `aki COMMAND ...`; a wrong input ends with a sentence and exit code 2, Ctrl-C with 130."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    command, rest = tyro.cli(
        Train | Compare | Chat | Mask,  # type: ignore[arg-type]
        args=arguments,
        prog="aki",
        description="Multimodal LLMs with modality-mutual attention.",
        return_unknown_args=True,
    )
    if not isinstance(command, Chat):
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # those of loading and saving; ours say more
    try:
        if rest and not isinstance(command, Train | Compare):
            name = type(command).__name__.lower()
            raise RecipeError(f"aki {name} does not know {' '.join(rest)}; see aki {name} --help.")
        command.run(rest)
    except KeyboardInterrupt:
        print("\naki: interrupted. `aki train --resume` goes on, and so does the same `aki compare`.", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"aki: {error}", file=sys.stderr)
        sys.exit(2)


def _recipe(path: Path, overrides: list[str]) -> Recipe:
    recipe = load_recipe(path)
    return tyro.cli(Recipe, args=overrides, default=recipe, prog=f"aki ... {path}") if overrides else recipe
