"""A stage of a recipe, from its first step (or its last whole checkpoint) to a folder that `from_pretrained` loads."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import BitsAndBytesConfig, EarlyStoppingCallback, TrainingArguments, set_seed

from aki.attention.guard import CHOOSE_CAUSAL, LeakError
from aki.data.collate import ChatCollator
from aki.data.digits import DigitScenes
from aki.data.feed import Position
from aki.data.memory import Batches, Memory
from aki.data.mixture import Mixture
from aki.data.orders import InEachOrder
from aki.data.pack import rope_index_of
from aki.data.packing import PackedCollator, PackedRows
from aki.data.report import TooManyBadSamples
from aki.data.schema import Sample
from aki.data.shards import ShardMixture
from aki.files import alone, write_json
from aki.models import AkiForConditionalGeneration, AkiProcessor
from aki.models.features import FeatureCache, lowest_precision
from aki.models.other import base_of, is_aki
from aki.prompts.blocks import PromptBlockWriter
from aki.training.adapting import freeze, quantization_config, with_adapter
from aki.training.data import (
    LOOKED_AT,
    REPORT,
    counted,
    load_position,
    open_samples,
    stage_collators,
    stage_loader,
    texts,
)
from aki.training.folder import RESULT, Begun, RunError, begin, first_process, relevant, sealed_weights, training_folder
from aki.training.held_out import HeldOut, held_out
from aki.training.model import build_model
from aki.training.predictions import PREDICTIONS, WithoutMedia, majority, summary, write_predictions
from aki.training.recipe import Recipe, RecipeError
from aki.training.scoring import accuracy_by_skill, answers_right
from aki.training.sharding import check_resumes, shards_anything, shards_weights, training_arguments, whole_models
from aki.training.start import check_start, has_scopes, learn_scopes, load_start, set_rule
from aki.training.trainer import AkiTrainer, Progress, replace_progress
from aki.training.view import training_scenes

_KEEP_BEST = {
    "load_best_model_at_end": True,
    "metric_for_best_model": "accuracy",
    "greater_is_better": True,
    "restore_callback_states_from_checkpoint": True,
}


@dataclass(frozen=True)
class Job:
    """One stage to run.

    Attributes:
        output: the folder that the model goes to; checkpoints and logs lie in `output/training`.
        start_from: a folder with the model to start from; None starts from random weights.
        title: what the progress bar is called.
        report: progress for a program instead of a person, see `Progress`.
        memory: of batches that other runs of this process were shown; needs `workers: 0`.
    """

    recipe: Recipe
    stage: str
    output: Path
    start_from: Path | None = None
    resume: bool = False
    title: str = ""
    report: Callable[[dict[str, Any]], None] | None = None
    memory: Memory | None = None

    @property
    def start(self) -> Path | None:
        """Of the weights: the folder, else the recipe's trained model, which may be a hub id."""
        pretrained = self.recipe.model.pretrained
        return self.start_from or (Path(pretrained) if pretrained else None)


def run_stage(job: Job) -> dict[str, Any]:
    """Train one stage, save model and processor, and return what was measured (also in `output/result.json`).

    Raises:
        RunError: the output holds a run and `resume` is not set, or a run of another recipe, start or data, or one of
            which nothing whole is left; or `start_from` holds no model, or one of other sizes than the recipe's.
        InUseError: another process is training there.
        SourceError, ShardError: data that is not there.
        ResumeError: a number of processes on which the run cannot go on.
        RecipeError: too little is held out.
        TooManyBadSamples: of the data.
        LeakError: the stage's rule does not fit its data.
    """
    try:
        return _run(job)
    except ImportError as error:
        if not job.recipe.trainer:
            raise
        raise RunError(f"trainer asks for a package that is not installed: {error}") from error


def _run(job: Job) -> dict[str, Any]:
    job = replace(job, recipe=counted(job.recipe, (job.stage,)))
    arguments = stage_arguments(job)
    lock = alone(training_folder(job.output) / "lock", f"the output folder {job.output}")
    with ExitStack() as held:

        def start() -> Begun:
            held.enter_context(lock)
            # What a hub id stands for is not looked into.
            folder = job.start if job.start_from or (job.start and job.start.is_dir()) else None
            return begin(job.recipe, job.stage, job.output, folder, job.resume)

        begun = first_process(start)
        return _train(job, arguments, begun.checkpoint) if begun.result is None else begun.result


def _train(job: Job, arguments: TrainingArguments, checkpoint: Path | None) -> dict[str, Any]:
    recipe, stage = job.recipe, job.recipe.stage(job.stage)
    # Before the data, which may take minutes to read the first time.
    if job.start:
        check_start(recipe, job.start)
    rank, ranks = arguments.process_index, arguments.world_size
    check_resumes(checkpoint, arguments)
    position = load_position(checkpoint, recipe, stage, rank, ranks)
    samples = open_samples(recipe, stage, ranks, position.places)
    set_seed(recipe.seed)
    model: Any
    processor: AkiProcessor | PromptBlockWriter
    with whole_models(arguments):
        if job.start:
            model, processor = load_start(job.start, quantized(recipe, job.start))
        else:
            model, processor = build_model(recipe, None if samples is None else texts(samples))
        if has_scopes(stage.rule):
            learn_scopes(model, processor, recipe.adapter is not None)
    collators = stage_collators(processor, stage, recipe.seed)
    asked = held_out(recipe, stage, collators[0])
    trainer = stage_trainer(job, arguments, model, collators, samples, position, asked)
    progress = Progress(job.title or job.stage, training_folder(job.output) / "log.txt", job.report)
    replace_progress(trainer, progress)
    # Before the model is in shards, which have less of them.
    parameters = sum(parameter.numel() for parameter in model.parameters())
    started = time.perf_counter()
    try:
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    except TooManyBadSamples:
        if trainer.loader is not None:
            trainer.loader.report.write(job.output / REPORT)
        raise
    except LeakError as error:
        raise type(error)(str(error).replace(CHOOSE_CAUSAL, f"{job.stage}.rule: causal")) from error
    finally:
        progress.close()
    result = {
        "stage": job.stage,
        "recipe": relevant(recipe, job.stage),
        "curve": [_point(entry) for entry in trainer.state.log_history if "eval_accuracy" in entry],
        "losses": [[entry["step"], entry["loss"]] for entry in trainer.state.log_history if "loss" in entry],
        "parameters": parameters,
        "steps": trainer.state.global_step,
        "seconds": time.perf_counter() - started,
        "guard_seconds": trainer.guard_seconds,
        "tokens": trainer.state.num_input_tokens_seen,
        "flops": trainer.state.total_flos,
    }
    if asked is not None:
        result["validation"] = _score(job, model, collators[0], asked.validation)
        result |= _tested(job, trainer, model, collators[0], asked.test)
        result |= {"held_out": asked.summary()} if asked.report else {}
    if stage.task == "question" and stage.order in ("text_first", "echo"):
        # Whoever asks this model asks as it was trained.
        processor.chat_template["default"] = collators[0].template
    _save(job, trainer, processor, result)
    return result


def _save(job: Job, trainer: AkiTrainer, processor: AkiProcessor | PromptBlockWriter, result: dict[str, Any]) -> None:
    """Model, processor and what was measured; the result comes last, because it says that the stage is done."""
    report = None if trainer.loader is None else trainer.data_report()
    # All processes take part: each may hold a shard of the weights.
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.is_world_process_zero():
        trainer.model.save_pretrained(job.output, state_dict=weights)
        processor.save_pretrained(job.output)
        if report is not None:
            report.write(job.output / REPORT)
        result["weights"] = sealed_weights(job.output)
        write_json(job.output / RESULT, result)
    trainer.accelerator.wait_for_everyone()


def stage_arguments(job: Job) -> TrainingArguments:
    recipe, stage = job.recipe, job.recipe.stage(job.stage)
    processes = int(os.environ.get("WORLD_SIZE", 1))
    own_loader = bool(stage.sources or stage.shards)
    lowest = stage.lowest_rate / stage.learning_rate
    owned: dict[str, Any] = {
        "output_dir": str(training_folder(job.output)),
        "max_steps": stage.number_of_steps,
        "per_device_train_batch_size": stage.batch_size,
        "gradient_accumulation_steps": recipe.accumulation(stage, processes),
        "learning_rate": stage.learning_rate,
        "lr_scheduler_type": "cosine_warmup_with_min_lr",
        # As shares, because DeepSpeed's optimizer does not tell the rate that it was given.
        "lr_scheduler_kwargs": {"min_lr_rate": lowest, "warmup_lr_rate": lowest},
        "warmup_steps": stage.warm_up,
        "weight_decay": stage.weight_decay,
        "adam_beta2": stage.adam_beta2,
        "max_grad_norm": stage.clip,
        "logging_steps": stage.log_every,
        "eval_strategy": "steps" if stage.eval_every else "no",
        "eval_steps": stage.eval_every or None,
        "save_strategy": "steps" if stage.save_every else "no",
        "save_steps": stage.save_every or 500,
        **(_KEEP_BEST if stage.patience else {}),
        "bf16": recipe.bf16,
        # There is nothing to shard over one process.
        "fsdp": recipe.fsdp is not None and processes > 1,
        "fsdp_config": dict(recipe.fsdp or {}),
        "seed": recipe.seed,
        "report_to": list(recipe.report_to),
        # A loader of our own begins where the checkpoint says, so nothing is skipped.
        "ignore_data_skip": own_loader,
        "dataloader_num_workers": recipe.workers,
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "label_names": ["labels"],
    }
    unless_said: dict[str, Any] = {
        "save_total_limit": 2,
        # Without an accelerator transformers refuses bf16 unless it is told that this is meant.
        "use_cpu": not torch.accelerator.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "dataloader_persistent_workers": recipe.workers > 0,
        # Batches are cut by rows where one process reads for all, and a row may have any number of pictures.
        "accelerator_config": {"dispatch_batches": False},
        # Joined rows have no mask to tell padding by.
        "include_num_input_tokens_seen": "all" if stage.joined else "non_padding",
    }
    return training_arguments(unless_said | recipe.trainer | owned)


def stage_trainer(
    job: Job,
    arguments: TrainingArguments,
    model: Any,
    collators: list[ChatCollator],
    samples: Mixture | ShardMixture | None,
    position: Position,
    asked: HeldOut | None,
) -> AkiTrainer:
    """What trains a stage, on DigitScenes where there are no `samples`; it gives the model the stage's rule."""
    recipe, stage, collator = job.recipe, job.recipe.stage(job.stage), collators[0]
    if recipe.trainer.get("label_smoothing_factor") and not is_aki(model):
        raise RecipeError("trainer.label_smoothing_factor: transformers smooths labels of AKI's own models alone.")
    whole = base_of(model)
    if recipe.adapter is not None and model is whole:
        model = with_adapter(model, recipe.adapter, _belongs_to(job))
    set_rule(model, collator.processor, stage.rule, recipe.attention)
    freeze(model, recipe, stage)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise RecipeError(
            f"frozen: {', '.join(stage.frozen)} leaves nothing to train, also of an adapter: take a part out."
        )
    settles = "vision_encoder" in stage.frozen and is_aki(model)
    data: dict[str, Any]
    if samples is None:
        assert isinstance(collator.processor, AkiProcessor)
        padding = collator.processor.tokenizer.pad_token_id
        train = training_scenes(recipe, stage, collator.processor)
        if settles:
            pictured = [collator([train[i]])["pixel_values"] for i in range(min(8, len(train)))]
        if stage.packing:
            rows = PackedRows(train, collators, stage.row_tokens, recipe.seed)
            data = {"data_collator": PackedCollator(padding), "train_dataset": rows}
        else:
            shown = Batches(train, InEachOrder(collators, padding), _name(train, collators), job.memory)
            data = {"data_collator": shown, "train_dataset": range(len(train))}
    else:
        rank, ranks = arguments.process_index, arguments.world_size
        rope_index = rope_index_of(model) if stage.joined and not is_aki(model) else None
        # AKI's own encoders run in each step as it is.
        meets = not is_aki(model) and shards_anything(arguments)
        loader = stage_loader(
            samples, collators, recipe, stage, rank, ranks, position, torch.cuda.is_available(), rope_index, meets
        )
        data = {"data_collator": collator, "loader": loader}
        if settles:
            seen = samples.peek(LOOKED_AT, lambda sample: (collator.encode(sample)[0].get("pixel_values"),))
            pictured = [one for (one,) in seen if one is not None][:8]
    if settles:
        _settle_encoder(whole, pictured, recipe, arguments)
    score = None if asked is None else lambda current: _score(job, current, collator, asked.validation)
    return AkiTrainer(
        model,
        arguments,
        **data,
        callbacks=[EarlyStoppingCallback(stage.patience)] if stage.patience else None,
        eval_dataset=None if asked is None else asked.validation,
        score=score,
        may_open_nothing=stage.seen > 0,
    )


def _belongs_to(job: Job) -> str:
    """The model under an adapter, by a name that is found from anywhere.

    Raises:
        RecipeError: it has none.
    """
    if job.start is None:
        raise RecipeError("an adapter belongs to a trained model: name it in model.pretrained, or in start_from.")
    return str(job.start.resolve() if job.start.is_dir() else job.start)


def quantized(recipe: Recipe, start: Path) -> BitsAndBytesConfig | None:
    """How weights are loaded below an adapter, where the recipe says so."""
    return recipe.quantization and quantization_config(recipe.quantization, str(start), recipe.bf16)


def _score(job: Job, model: Any, collator: ChatCollator, questions: Dataset) -> dict[str, float]:
    return accuracy_by_skill(model, **_asking(job, collator, questions))


def _tested(
    job: Job, trainer: AkiTrainer, model: Any, collator: ChatCollator, questions: Dataset[Sample]
) -> dict[str, Any]:
    """The final numbers; of own questions also what knowing nothing of the pictures scores, and `predictions.jsonl`."""
    found = answers_right(model, **_asking(job, collator, questions))
    if isinstance(questions, DigitScenes):
        return {"test": summary(found)}
    samples = [questions[number] for number in range(len(found))]
    # Of sharded weights generation would have to gather every layer for every token; `aki eval --recipe` asks later.
    if trainer.is_world_process_zero() and not shards_weights(trainer.args):
        batch_size = job.recipe.stage(job.stage).batch_size
        right = [ok for ok, _ in found]
        write_predictions(job.output / PREDICTIONS, base_of(model), collator, samples, right, batch_size)
    return {
        "test": summary(found),
        "baselines": {
            "majority": majority([(sample.answer,) for sample in samples], [group for _, group in found]),
            "blind": _score(job, model, collator, WithoutMedia(questions)),
        },
    }


def _asking(job: Job, collator: ChatCollator, questions: Dataset) -> dict[str, Any]:
    """What `answers_right` is called with beside the model."""
    if isinstance(questions, DigitScenes):
        name = _name(questions, [collator])
        return {"collator": collator, "dataset": questions, "name": name, "memory": job.memory}
    # As in training: its rows, and as many as fit there. Pictures of files are too many to remember.
    padded = PackedCollator(collator.processor.tokenizer.pad_token_id)
    return {
        "collator": lambda samples: padded([collator.encode(sample)[0] for sample in samples]),
        "dataset": questions,
        "batch_size": job.recipe.stage(job.stage).batch_size,
    }


def _name(scenes: DigitScenes, collators: list[ChatCollator]) -> str:
    """Everything that a batch of these scenes depends on."""
    what = (scenes.split, scenes.task, scenes.seed, scenes.image_size, scenes.grid, scenes.skills)
    how = [
        (one.template, one.max_length, one.processor.image_seq_length, one.seen, one.causal, one.seed)
        for one in collators
    ]
    return repr((what, how))


def _settle_encoder(
    model: AkiForConditionalGeneration, pictures: list[Tensor], recipe: Recipe, arguments: TrainingArguments
) -> None:
    """A frozen encoder runs in the lowest precision that keeps its features, and once a picture if there is a cache.

    Where there are no pictures to settle it on, it keeps its own.

    Raises:
        RunError: a cache, and an encoder that is sharded.
    """
    backbone = model.model
    backbone.vision_encoder.to(arguments.device)
    backbone.encoder_dtype = backbone.vision_encoder.dtype
    if pictures:
        backbone.encoder_dtype = lowest_precision(model.patch_features, torch.cat(pictures).to(arguments.device))
    if recipe.feature_cache is not None and shards_weights(arguments):
        raise RunError(
            "the vision encoder is in shards (fsdp, or DeepSpeed's third stage): all processes run it at the same "
            "time, and feature_cache would let some of them skip it. Take one of the two out of the recipe."
        )
    if recipe.feature_cache is not None:
        backbone.feature_cache = FeatureCache(recipe.feature_cache, backbone.vision_encoder, backbone.encoder_dtype)


def _point(entry: dict[str, Any]) -> dict[str, Any]:
    scores = {name.removeprefix("eval_"): value for name, value in entry.items() if name.startswith("eval_")}
    return {"step": entry["step"], **scores}
