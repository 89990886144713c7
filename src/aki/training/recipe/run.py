"""The recipe: everything that decides a training run."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product
from os.path import normpath
from typing import Any

from aki.attention import BACKENDS
from aki.training.arguments import read_trainer
from aki.training.recipe.data import DataRecipe, check_weights
from aki.training.recipe.errors import RecipeError, one_of
from aki.training.recipe.model import AdapterRecipe, ModelRecipe, QuantizationRecipe
from aki.training.recipe.stage import PretrainRecipe, StageRecipe

STAGES = ("pretrain", "sft")


@dataclass
class Recipe:
    """A run: a model, its data, and one stage or both, each of which starts from the one before.

    Attributes:
        name: what the run is called; its models go to runs/NAME unless --output says another folder.
        model: what is trained, or what it is made of.
        pretrain: the first stage, captions.
        sft: the second stage, questions.
        data: DigitScenes, for stages that name no data of their own, and the questions that models are measured on.
        root: the folder that relative paths of sources and shards are below.
        start_from: a folder with the model that the first stage starts from, instead of `model`.
        adapter: what is trained instead of the model's own weights; absent trains those.
        quantization: of the weights below an adapter; absent keeps them whole.
        trainer: any other field of transformers' TrainingArguments, for both stages.
        devices: processes that a step's samples are for. Fewer accumulate gradients, so that a step stays the same.
        fsdp: transformers' `fsdp_config`, to shard the model over processes; without it each holds all of it.
        seed: decides weights, data and everything drawn.
        workers: processes that prepare batches, for each that trains.
        bf16: autocast to bfloat16.
        attention: what computes the language model's attention: auto, segments, sdpa or eager.
        cache: a folder for parsed annotations; that of the `datasets` library if absent.
        feature_cache: a folder for the features of a frozen vision encoder, for pictures that repeat over epochs.
        report_to: the Trainer's integrations: none, tensorboard, trackio, wandb, ...
        rows: what `aki compare` compares: name -> what differs from this recipe, nested as it is here, and perhaps a
            `title`, and `against`: the row that it is compared with (`causal` if absent, none if null).
        learning_rates: those of SFT that `aki compare` tries for each row first; empty keeps the recipe's.
    """

    name: str
    model: ModelRecipe
    data: DataRecipe = field(default_factory=DataRecipe)
    pretrain: PretrainRecipe | None = None
    sft: StageRecipe | None = None
    root: str = "."
    start_from: str | None = None
    adapter: AdapterRecipe | None = None
    quantization: QuantizationRecipe | None = None
    trainer: dict[str, Any] = field(default_factory=dict)
    devices: int = 1
    fsdp: dict[str, Any] | None = None
    seed: int = 0
    workers: int = 1
    bf16: bool = False
    attention: str = "auto"
    cache: str | None = None
    feature_cache: str | None = None
    report_to: tuple[str, ...] = field(default=("none",))
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    learning_rates: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        one_of("attention", self.attention, (*BACKENDS, "sdpa", "eager"))
        if self.model.pretrained and self.start_from:
            raise RecipeError("model.pretrained and start_from both say what to start from: leave one out.")
        if self.quantization and not self.adapter:
            raise RecipeError("quantization keeps weights that cannot be trained: add an adapter, which is.")
        self.trainer = read_trainer(self.trainer)
        stages = [self.stage(name) for name in self.stages]
        if not stages:
            raise RecipeError(f"a recipe has at least one stage: {' or '.join(STAGES)}.")
        for name, least in (("devices", 1), ("workers", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise RecipeError(f"{name} must be at least {least}, it is {getattr(self, name)}.")
        if self.feature_cache and any("vision_encoder" not in stage.frozen for stage in stages):
            raise RecipeError(
                "feature_cache needs a vision_encoder that is frozen in every stage: its features change."
            )

        check_weights("data.held_out", self.data.held_out)
        for name in self.stages:
            self._check_held_out(name, self.stage(name))

    def _check_held_out(self, name: str, stage: StageRecipe) -> None:
        if stage.eval_every and (stage.sources or stage.shards) and not self.data.held_out:
            raise RecipeError(
                f"{name}.eval_every measures held-out questions: name their sources in data.held_out, or set it to 0."
            )
        for asked, learned in product(self.data.held_out, stage.sources):
            shared = set(map(normpath, asked.annotations)) & set(map(normpath, learned.annotations))
            if shared and asked.options == learned.options:
                raise RecipeError(
                    f"data.held_out and {name}.sources both read {min(shared)}: a model would be asked what it has "
                    "learned; hold out a file of its own."
                )

    @property
    def stages(self) -> tuple[str, ...]:
        """The names of its stages, in order."""
        return tuple(name for name in STAGES if getattr(self, name) is not None)

    def stage(self, name: str) -> StageRecipe:
        """
        Raises:
            RecipeError: it has no such stage.
        """
        return getattr(self, one_of("stage", name, self.stages))

    def accumulation(self, stage: StageRecipe, processes: int) -> int:
        """Batches that a process takes before each step, so that a step has the recipe's samples on so many processes.

        Raises:
            RecipeError: they cannot be dealt out evenly.
        """
        if processes < 1:
            raise RecipeError(f"processes must be at least 1, it is {processes}.")
        batches = stage.gradient_accumulation_steps * self.devices
        if batches % processes:
            raise RecipeError(
                f"a step has {batches} batches ({self.devices} devices x {stage.gradient_accumulation_steps}), which "
                f"{processes} processes cannot share evenly: start another number, or set devices."
            )
        return batches // processes

    def processes(self, available: int) -> int:
        """The most of the available processes that share every stage's steps evenly."""
        batches = [self.stage(name).gradient_accumulation_steps * self.devices for name in self.stages]
        return max(n for n in range(1, available + 1) if all(each % n == 0 for each in batches))
