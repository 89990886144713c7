"""How long a training step takes: rows in turn in one process, so that a busy machine disturbs all of them alike."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import set_seed

from aki.data.feed import Position
from aki.evaluation.plan import Cell, row_recipe
from aki.files import write_json
from aki.models import AkiConfig, AkiForConditionalGeneration, AkiProcessor
from aki.training.data import open_samples, stage_collators, texts
from aki.training.model import build_processor, model_config
from aki.training.recipe import Recipe, beyond_defaults
from aki.training.stages import Job, quantized, stage_arguments, stage_trainer
from aki.training.start import has_scopes, learn_scopes, load_start, set_rule
from aki.training.trainer import AkiTrainer

FILE = "steps.json"
ROUNDS, WARM_UP, BATCHES = 20, 2, 4

Steps = dict[str, Any]
"""What the file holds: `base`, `rounds`, `machine`, and of each row in `rows` its `fingerprint`, `seconds` (median) and
`ratio` (median of its seconds relative to the base's in the same round)."""


@dataclass
class Step:
    """A row's SFT step as the trainer does it: leak guard, forward, backward, clipping, AdamW. The weights stay.

    Attributes:
        model: perhaps other rows' too.
    """

    model: Any
    trainer: AkiTrainer
    batches: Iterator[dict[str, Any]]
    rule: str
    processor: Any
    attention: str

    def __call__(self) -> tuple[float, float]:
        """Take one step; returns its seconds, and those of them that the leak guard took."""
        trainer, arguments = self.trainer, self.trainer.args
        set_rule(self.model, self.processor, self.rule, self.attention)
        batches = list(islice(self.batches, arguments.gradient_accumulation_steps))
        _wait_for_device()
        started, guarded = time.perf_counter(), trainer.guard_seconds
        for batch in batches:
            with trainer.accelerator.autocast():
                trainer.training_step(self.model, batch)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), arguments.max_grad_norm)
        trainer.optimizer.step()
        self.model.zero_grad()
        _wait_for_device()
        return time.perf_counter() - started, trainer.guard_seconds - guarded


def row_steps(recipe: Recipe, rows: Sequence[str], folder: Path) -> dict[str, Step]:
    """The step of each row, with a few of its batches; rows whose models are alike share one, of random weights.

    Args:
        folder: for what trainers write.

    Raises:
        SourceError, ShardError: data that is not there.
    """
    shared: dict[str, tuple[Any, Any, torch.optim.Optimizer | None]] = {}
    memory: dict = {}
    steps = {}
    for row in rows:
        own = replace(row_recipe(recipe, recipe.rows[row], recipe.seed), workers=0, report_to=("none",))
        stage = own.sft = replace(own.stage("sft"), eval_every=0, save_every=0)
        samples = open_samples(own, stage, 1, {})
        alike = (
            own.model,
            own.start_from,
            own.adapter,
            own.attention,
            stage.frozen,
            own.data.grid,
            stage.sources,
            stage.shards,
        )
        key = json.dumps(beyond_defaults(alike), sort_keys=True)
        if key not in shared:
            shared[key] = (*_untrained(own, samples), None)
        model, processor, optimizer = shared[key]
        job = Job(own, "sft", folder / row, memory=memory)
        if has_scopes(stage.rule):
            learn_scopes(model, processor, recipe.adapter is not None)
        collators = stage_collators(processor, stage, recipe.seed)
        set_seed(own.seed)
        trainer = stage_trainer(job, stage_arguments(job), model, collators, samples, Position(), None)
        trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
        trainer.optimizer = optimizer or trainer.create_optimizer()
        for group in trainer.optimizer.param_groups:
            group["lr"] = 0.0
        model = trainer.model  # with its adapter, which rows share too
        shared[key] = (model, processor, trainer.optimizer)
        batches = list(islice(trainer.get_train_dataloader(), BATCHES))
        steps[row] = Step(model, trainer, cycle(batches), stage.rule, processor, own.attention)
    return steps


def take_turns(steps: Mapping[str, Step], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """What each step returned in each round; every other round goes backwards."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    numbers = range(-WARM_UP, rounds)
    with tqdm(numbers, desc="time a step", unit="round", leave=False, dynamic_ncols=True) as bar:
        for number in bar:
            for name in list(steps)[:: 1 if number % 2 else -1]:
                seconds = steps[name]()
                if number >= 0:
                    taken[name].append(seconds)
    return taken


def ratios(taken: Mapping[str, list[tuple[float, float]]], base: str) -> dict[str, float]:
    """The median over rounds of each row's seconds relative to the base's in the same round."""
    return {
        row: statistics.median(own / of_base for (own, _), (of_base, _) in zip(times, taken[base], strict=True))
        for row, times in taken.items()
    }


def time_steps(recipe: Recipe, rows: Sequence[str]) -> Steps:
    """Measure these rows of the recipe."""
    with TemporaryDirectory() as folder:
        taken = take_turns(row_steps(recipe, rows, Path(folder)), ROUNDS)
    base = "causal" if "causal" in rows else rows[0]
    relative = ratios(taken, base)
    return {
        "base": base,
        "rounds": ROUNDS,
        "machine": _machine(),
        "rows": {
            row: {
                "fingerprint": _fingerprint(recipe, row),
                "seconds": statistics.median(seconds for seconds, _ in taken[row]),
                "ratio": relative[row],
            }
            for row in rows
        },
    }


def time_missing(recipe: Recipe, output: Path, rows: Sequence[str]) -> None:
    """Measure unless the folder holds a measurement of all these rows; those that it has are then measured again."""
    there = (load_steps(recipe, output) or {"rows": {}})["rows"]
    if set(rows) - set(there):
        write_json(output / FILE, time_steps(recipe, [row for row in recipe.rows if row in rows or row in there]))


def load_steps(recipe: Recipe, output: Path) -> Steps | None:
    """What was measured of rows that are still as they were; None if nothing was."""
    if not (output / FILE).exists():
        return None
    steps = json.loads((output / FILE).read_text())
    same = {
        row: measured
        for row, measured in steps["rows"].items()
        if row in recipe.rows and measured["fingerprint"] == _fingerprint(recipe, row)
    }
    return steps | {"rows": same} if steps["base"] in same else None


def _fingerprint(recipe: Recipe, row: str) -> str:
    return Cell(row, row, "sft", row_recipe(recipe, recipe.rows[row], recipe.seed)).fingerprint


def _untrained(recipe: Recipe, samples: Any) -> tuple[Any, Any]:
    """A model of the recipe's sizes and its processor; of a trained model the model itself, whose weights stay."""
    if recipe.model.pretrained:
        start = Path(recipe.model.pretrained)
        return load_start(start, quantized(recipe, start))
    if recipe.start_from:
        config = AkiConfig.from_pretrained(recipe.start_from)
        return AkiForConditionalGeneration(config), AkiProcessor.from_pretrained(recipe.start_from)
    processor = build_processor(recipe, None if samples is None else texts(samples))
    return AkiForConditionalGeneration(model_config(recipe.model, processor.tokenizer)), processor


def _wait_for_device() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def _machine() -> str:
    if torch.accelerator.is_available():
        return f"{torch.accelerator.current_accelerator()}"
    return f"{torch.get_num_threads()} CPU thread(s)"
