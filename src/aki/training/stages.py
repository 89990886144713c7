"""A stage of a recipe, from its first step (or its last whole checkpoint) to a folder that `from_pretrained` loads."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, TrainingArguments, set_seed
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from aki.data.collate import ChatCollator
from aki.data.digits import PIXEL_MEAN, PIXEL_STD, DigitScenes, corpus
from aki.data.packing import PackedCollator, PackedRows
from aki.data.tokenizer import train_tokenizer
from aki.models import AkiConfig, AkiConnectorConfig, AkiForConditionalGeneration, AkiProcessor
from aki.models.features import FeatureCache, lowest_precision
from aki.models.templates import CAPTION, SHORT
from aki.training.recipe import Recipe, StageRecipe, known
from aki.training.scoring import accuracy_by_skill
from aki.training.trainer import AkiTrainer, Progress, has_whole_checkpoint, last_whole_checkpoint, replace_progress

RESULT = "result.json"
TEST_SEED = 1
"""Of the scenes that the final numbers are measured on; the learning curve has seed 0."""


class RunError(ValueError):
    """A run that cannot start as asked."""


@dataclass(frozen=True)
class Job:
    """One stage to run.

    Attributes:
        output: the folder that the model goes to; checkpoints and logs lie in `output/training`.
        start_from: a folder with the model to start from; None starts from random weights.
        title: what the progress bar is called.
        machine: progress for a parent process instead of a person.
    """

    recipe: Recipe
    stage: str
    output: Path
    start_from: Path | None = None
    resume: bool = False
    title: str = ""
    machine: bool = False


def run_stage(job: Job) -> dict[str, Any]:
    """Train one stage, save model and processor, and return what was measured (also in `output/result.json`).

    Raises:
        RunError: the output holds a run and `resume` is not set, or a run of another recipe.
        LeakError: the stage's rule does not fit its data.
    """
    fingerprint = {"stage": job.stage, "recipe": _relevant(job.recipe, job.stage)}
    finished = _finished(job, fingerprint)
    if finished is not None:
        return finished
    recipe, stage = job.recipe, job.recipe.stage(job.stage)
    set_seed(recipe.seed)
    model, processor = _load(job.start_from) if job.start_from else build_model(recipe)
    model.config.attention_rule = stage.rule
    model.set_attn_implementation({"text_config": recipe.attention})
    for part in stage.frozen:
        getattr(model, part).requires_grad_(False)
    collator = _collator(processor, stage)
    trainer = _trainer(job, model, processor, collator)
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=last_whole_checkpoint(_training(job)))
    seconds = time.perf_counter() - started
    result = fingerprint | {
        "curve": [_point(entry) for entry in trainer.state.log_history if "eval_accuracy" in entry],
        "losses": [[entry["step"], entry["loss"]] for entry in trainer.state.log_history if "loss" in entry],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": seconds,
        "guard_seconds": trainer.guard_seconds,
    }
    if stage.task == "question":
        test = questions(recipe, processor, "test", recipe.data.test_size, TEST_SEED)
        result["test"] = accuracy_by_skill(model, collator, test)
    model.save_pretrained(job.output)
    processor.save_pretrained(job.output)
    write_json(job.output / RESULT, result)
    return result


def build_model(recipe: Recipe) -> tuple[AkiForConditionalGeneration, AkiProcessor]:
    """A new model with random weights, and a processor whose tokenizer is trained from the data's own text."""
    tokenizer = train_tokenizer(corpus(recipe.data.grid))
    text = recipe.model.text | {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    text_config = _config("text", text)
    _check_fields("connector", recipe.model.connector, AkiConnectorConfig())
    config = AkiConfig(
        vision_config=_config("vision", recipe.model.vision),
        text_config=text_config,
        connector_config=recipe.model.connector,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        initializer_range=text_config.initializer_range,
    )
    model = AkiForConditionalGeneration(config)
    size = recipe.model.vision["image_size"]
    image_processor = SiglipImageProcessorPil(
        size={"height": size, "width": size}, image_mean=[PIXEL_MEAN] * 3, image_std=[PIXEL_STD] * 3
    )
    templates = {"default": SHORT, "caption": CAPTION}
    processor = AkiProcessor(image_processor, tokenizer, config.image_seq_length, chat_template=templates)
    return model, processor


def questions(recipe: Recipe, processor: AkiProcessor, split: str, size: int, seed: int) -> DigitScenes:
    return DigitScenes(split, "question", size, _image_size(processor), recipe.data.grid, seed)


def write_json(path: Path, value: Any) -> None:
    """Write all of a JSON file or nothing of it."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(partial, path)


def _trainer(
    job: Job, model: AkiForConditionalGeneration, processor: AkiProcessor, collator: ChatCollator
) -> AkiTrainer:
    recipe, stage = job.recipe, job.recipe.stage(job.stage)
    samples = stage.steps * stage.batch_size * stage.gradient_accumulation_steps
    train = DigitScenes("train", stage.task, samples, _image_size(processor), recipe.data.grid, recipe.seed)
    if "vision_encoder" in stage.frozen:
        _settle_encoder(model, collator([train[i] for i in range(min(8, samples))])["pixel_values"], recipe)
    held_out = questions(recipe, processor, "test", recipe.data.eval_size, seed=0)
    training = _training(job)
    training.mkdir(parents=True, exist_ok=True)
    arguments = TrainingArguments(
        output_dir=str(training),
        max_steps=stage.steps,
        per_device_train_batch_size=stage.batch_size,
        gradient_accumulation_steps=stage.gradient_accumulation_steps,
        learning_rate=stage.learning_rate,
        lr_scheduler_type="cosine_warmup_with_min_lr",
        lr_scheduler_kwargs={
            "min_lr": stage.min_learning_rate,
            "warmup_lr_rate": stage.min_learning_rate / stage.learning_rate,
        },
        warmup_steps=stage.warmup_steps,
        weight_decay=stage.weight_decay,
        adam_beta2=stage.adam_beta2,
        max_grad_norm=stage.clip,
        logging_steps=stage.log_every,
        eval_strategy="steps" if stage.eval_every else "no",
        eval_steps=stage.eval_every or None,
        save_strategy="steps" if stage.save_every else "no",
        save_steps=stage.save_every or 500,
        save_total_limit=2,
        bf16=recipe.bf16,
        seed=recipe.seed,
        report_to=list(recipe.report_to),
        dataloader_num_workers=recipe.workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        dataloader_persistent_workers=recipe.workers > 0,
        remove_unused_columns=False,
        # Batches are cut by rows where one process reads for all, and a row may have any number of pictures.
        accelerator_config={"dispatch_batches": False},
        disable_tqdm=True,
        label_names=["labels"],
    )
    trainer = AkiTrainer(
        model,
        arguments,
        data_collator=PackedCollator(processor.tokenizer.pad_token_id) if stage.packing else collator,
        train_dataset=PackedRows(train, collator, stage.row_tokens, recipe.seed) if stage.packing else train,
        eval_dataset=held_out,
        score=lambda current: accuracy_by_skill(current, collator, held_out),
    )
    replace_progress(trainer, Progress(job.title or job.stage, training / "log.txt", job.machine))
    return trainer


def _settle_encoder(model: AkiForConditionalGeneration, pixel_values: Tensor, recipe: Recipe) -> None:
    """A frozen encoder runs in the lowest precision that keeps its features, and once a picture if there is a cache."""
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    model.vision_encoder.to(device)
    model.encoder_dtype = lowest_precision(model.patch_features, pixel_values.to(device))
    if recipe.feature_cache is not None:
        model.feature_cache = FeatureCache(recipe.feature_cache, model.vision_encoder, model.encoder_dtype)


def _collator(processor: AkiProcessor, stage: StageRecipe) -> ChatCollator:
    return ChatCollator(processor, stage.max_length, "caption" if stage.task == "caption" else None)


def _load(folder: Path) -> tuple[AkiForConditionalGeneration, AkiProcessor]:
    if not (folder / "config.json").exists():
        raise RunError(f"{folder} holds no model to start from: run the stage before it first.")
    return AkiForConditionalGeneration.from_pretrained(folder), AkiProcessor.from_pretrained(folder)


def _config(part: str, sizes: dict[str, Any]):
    """The transformers configuration of a part, whose fields are as strict as the recipe's own."""
    kind = known("model_type", sizes.get("model_type", ""), CONFIG_MAPPING, f"model.{part}")
    _check_fields(part, sizes, AutoConfig.for_model(kind))
    return AutoConfig.for_model(**sizes)


def _check_fields(part: str, sizes: dict[str, Any], defaults: PreTrainedConfig) -> None:
    for name in sizes:
        known("key", name, [field for field in dir(defaults) if not field.startswith("_")], f"model.{part}")


def _image_size(processor: AkiProcessor) -> int:
    return processor.image_processor.size["height"]


def _training(job: Job) -> Path:
    return job.output / "training"


def _relevant(recipe: Recipe, stage: str) -> dict[str, Any]:
    """What of the recipe decides this stage's result."""
    values = json.loads(json.dumps(dataclasses.asdict(recipe)))
    for name in ("report_to", "workers", "name"):
        values.pop(name)
    if stage == "pretrain":
        values.pop("sft")
    return values


def _finished(job: Job, fingerprint: dict[str, Any]) -> dict[str, Any] | None:
    result = job.output / RESULT
    # A run that failed before its first checkpoint has nothing to lose.
    begun = has_whole_checkpoint(_training(job))
    if not job.resume and (result.exists() or begun):
        raise RunError(f"{job.output} already holds a run: pass --resume to continue it, or choose another --output.")
    if not begun and not result.exists():
        job.output.mkdir(parents=True, exist_ok=True)
        _training(job).mkdir(parents=True, exist_ok=True)
        write_json(_training(job) / "run.json", fingerprint)
        return None
    recorded = _training(job) / "run.json"
    if recorded.exists() and json.loads(recorded.read_text()) != fingerprint:
        raise RunError(f"{job.output} holds a run of another recipe: choose another --output, or delete it.")
    return json.loads(result.read_text()) if result.exists() else None


def _point(entry: dict[str, Any]) -> dict[str, Any]:
    scores = {name.removeprefix("eval_"): value for name, value in entry.items() if name.startswith("eval_")}
    return {"step": entry["step"], **scores}
