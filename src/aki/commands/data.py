"""`aki data`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import OmitArgPrefixes, Positional, arg, subcommand

from aki.commands.shared import TakesPlugins, read_recipe

if TYPE_CHECKING:
    from aki.training.recipe import Recipe


@dataclass
class Show(TakesPlugins):
    """Draw samples as training sees them: the picture after pre-processing, the text by its parts, the mask."""

    recipe: Annotated[Positional[Path], arg(metavar="RECIPE")]
    """A YAML file, or the name of one of aki's own recipes, as digits."""
    n: int = 12
    """Samples."""
    picture: Path = Path("sheet.png")
    stage: Literal["pretrain", "sft"] | None = None
    """The recipe's last if absent."""
    tiny: bool = False
    """As `aki train --tiny`: small pictures, and a tokenizer of the data's own text."""
    tokens: bool = False
    """Print every token instead, those that are learned in [brackets]; works with any model's processor."""

    def run(self, overrides: list[str]) -> None:
        from aki.apps.sheet import Shown, draw_sheet
        from aki.models import AkiProcessor
        from aki.training.view import stage_view, tokens_of

        recipe = _recipe(self.recipe, overrides, self.tiny)
        stage = self.stage or recipe.stages[-1]
        view = stage_view(recipe, stage)
        if self.tokens:
            for name, line in view.first(self.n, lambda s: (f"{s.source}/{s.id}", tokens_of(view.collator, s))):
                print(f"{name}: {line}\n")
            return
        if not isinstance(view.processor, AkiProcessor):
            raise ValueError("data show draws what AKI's processor makes: add --tokens to print any other's.")
        shown = view.first(self.n, lambda s: Shown(f"{s.source}/{s.id}", view.collator.encode(s)[0]))
        draw_sheet(shown, view.processor, recipe.stage(stage).rule, self.picture)
        print(f"{len(shown)} samples of {stage} drawn in {self.picture}")


@dataclass
class Check(TakesPlugins):
    """Read everything once: what can be used, what is skipped and why, how long samples are, images a second."""

    recipe: Annotated[Positional[Path], arg(metavar="RECIPE")]
    """A YAML file, or the name of one of aki's own recipes, as digits."""
    stage: Literal["pretrain", "sft"] | None = None
    """All if absent."""
    limit: int = 0
    """Samples of each source, evenly spread; 0 reads all."""
    tiny: bool = False
    """As `aki train --tiny`: small pictures, and a tokenizer of the data's own text."""

    def run(self, overrides: list[str]) -> None:
        if self.limit < 0:
            raise ValueError(f"--limit is a number of samples, 0 for all, not {self.limit}.")
        recipe = _recipe(self.recipe, overrides, self.tiny)
        for stage in (self.stage,) if self.stage else recipe.stages:
            self._check(recipe, stage)

    def _check(self, recipe: Recipe, stage: str) -> None:
        from aki.data.check import check_source, table, total
        from aki.training.view import stage_view

        view = stage_view(recipe, stage)
        checked = [
            check_source(name, source, view.collator, recipe.workers, self.limit) for name, source in view.sources
        ]
        print(f"{stage}: up to {view.collator.max_length} tokens a sample, {recipe.workers} worker(s)\n")
        print(table(checked), end="\n\n")
        report = total(checked).report
        for name, tally in report.sources.items():
            for reason, examples in tally.examples.items():
                print(f"{name}, {reason}: {'; '.join(examples)}")
        report.max_share = recipe.stage(stage).max_bad_share
        report.check(complete=True)


@dataclass
class Data:
    """Look at a recipe's data before training. Every field of the recipe can be overridden: --sft.max_length 100"""

    action: OmitArgPrefixes[Annotated[Show, subcommand("show")] | Annotated[Check, subcommand("check")]]

    def run(self, overrides: list[str]) -> None:
        self.action.run(overrides)


def _recipe(path: Path, overrides: list[str], small: bool) -> Recipe:
    from aki.training.model import tiny

    recipe = read_recipe(path, overrides)
    return replace(tiny(recipe), start_from=None) if small else recipe
