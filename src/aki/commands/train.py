"""`aki train`."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from aki.commands.shared import TakesPlugins, read_recipe
from aki.training.recipe import Recipe


@dataclass
class Train(TakesPlugins):
    """Train the stages of a recipe. Every field of the recipe can be overridden: --sft.steps 100"""

    recipe: Annotated[Positional[Path], arg(metavar="RECIPE")]
    """A YAML file, or the name of one of aki's own recipes, as digits."""
    output: Path | None = None
    """Where the models go, runs/NAME if absent."""
    stage: Literal["all", "pretrain", "sft"] = "all"
    """Of two stages, all go to folders of their own in --output; one alone goes to --output itself."""
    start_from: Path | None = None
    """A folder with the model that the first stage starts from, the recipe's if absent."""
    resume: bool = False
    """Go on from the last whole checkpoint."""
    progress: Literal["bar", "json"] = "bar"
    """A bar for a person, or JSON lines on standard output for a program."""
    dry_run: bool = False
    """Print what it would take, and load and train nothing."""
    tiny: bool = False
    """Shrink the three parts, and keep everything else: a rehearsal."""
    processes: int | None = None
    """That train on this machine, a GPU each; as many of its GPUs as can share a step if absent. On several machines
    start torchrun or accelerate launch yourself."""

    def run(self, overrides: list[str]) -> None:
        from aki.training.data import counted

        recipe = read_recipe(self.recipe, overrides)
        if self.tiny:
            from aki.training.model import tiny

            recipe = tiny(recipe)
        recipe = counted(recipe, self._stages(recipe))
        processes = self._processes(recipe)
        if self.dry_run:
            self._print_estimates(recipe, processes)
        # DeepSpeed asks for a launcher also of one process.
        elif (processes > 1 or recipe.trainer.get("deepspeed")) and not _launched():
            _launch(processes)
        else:
            self._train(recipe)

    def _stages(self, recipe: Recipe) -> tuple[str, ...]:
        if self.stage == "all":
            return recipe.stages
        recipe.stage(self.stage)
        return (self.stage,)

    def _start(self, recipe: Recipe) -> Path | None:
        return self.start_from or (Path(recipe.start_from) if recipe.start_from else None)

    def _processes(self, recipe: Recipe) -> int:
        if _launched():
            return int(os.environ["WORLD_SIZE"])
        if self.processes is not None:
            return self.processes
        if self.dry_run:
            return recipe.devices

        import torch

        return recipe.processes(max(torch.cuda.device_count(), 1))

    def _print_estimates(self, recipe: Recipe, processes: int) -> None:
        from aki.training.estimate import describe, estimate
        from aki.training.start import check_start

        start = self._start(recipe)
        # A stage may be planned before the one that it starts from has run.
        if start is not None and start.exists():
            check_start(recipe, start)
        for name in self._stages(recipe):
            stage = recipe.stage(name)
            print(describe(name, stage, estimate(recipe, stage, processes)))

    def _train(self, recipe: Recipe) -> None:
        from aki.training.stages import Job, run_stage

        output = self.output or Path("runs") / recipe.name
        start_from = self._start(recipe)
        names = self._stages(recipe)
        says = self.progress == "bar" and int(os.environ.get("RANK", 0)) == 0
        for name in names:
            folder = output / name if len(names) > 1 else output
            stage = recipe.stage(name)
            if says:
                new = "trained backbones" if recipe.model.from_backbones else "random weights"
                start = start_from or recipe.model.pretrained or new
                print(f"{name}: {stage.steps} steps of {stage.batch_size}, rule {stage.rule}, from {start} to {folder}")
            report = _print_json if self.progress == "json" else None
            result = run_stage(Job(recipe, name, folder, start_from, self.resume, name, report))
            if says:
                scores = [f"  {skill} {value:.3f}" for skill, value in result.get("test", {}).items()]
                print(*scores, f"  saved in {folder}", sep="\n")
            start_from = folder


def _launched() -> bool:
    """Whether torchrun or accelerate launch started this process."""
    return "WORLD_SIZE" in os.environ


def _launch(processes: int) -> None:
    """Start this command in so many processes."""
    from torch.distributed.run import main

    main(["--standalone", "--nproc-per-node", str(processes), "-m", "aki", *sys.argv[1:]])


def _print_json(news: dict[str, Any]) -> None:
    print(json.dumps(news), flush=True)
