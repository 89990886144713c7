"""transformers' TrainingArguments out of a stage, and out of all that a recipe hands on to them."""

from __future__ import annotations

import dataclasses
from difflib import get_close_matches
from typing import Any

OWNED = {
    "output_dir": "--output",
    "resume_from_checkpoint": "--resume",
    "max_steps": "the stage's steps",
    "num_train_epochs": "the stage's epochs",
    "per_device_train_batch_size": "the stage's batch_size",
    "gradient_accumulation_steps": "the stage's gradient_accumulation_steps",
    "learning_rate": "the stage's learning_rate",
    "lr_scheduler_type": "the stage's learning_rate, min_learning_rate and warmup_steps, a cosine",
    "lr_scheduler_kwargs": "the stage's learning_rate, min_learning_rate and warmup_steps, a cosine",
    "warmup_steps": "the stage's warmup_steps",
    "weight_decay": "the stage's weight_decay",
    "adam_beta2": "the stage's adam_beta2",
    "max_grad_norm": "the stage's clip",
    "logging_strategy": "the stage's log_every",
    "logging_steps": "the stage's log_every",
    "eval_strategy": "the stage's eval_every",
    "eval_steps": "the stage's eval_every",
    "load_best_model_at_end": "the stage's patience",
    "metric_for_best_model": "the stage's patience",
    "greater_is_better": "the stage's patience",
    "restore_callback_states_from_checkpoint": "the stage's patience",
    "save_strategy": "the stage's save_every",
    "save_steps": "the stage's save_every",
    "bf16": "the recipe's bf16",
    "fsdp": "the recipe's fsdp",
    "fsdp_config": "the recipe's fsdp",
    "seed": "the recipe's seed",
    "data_seed": "the recipe's seed",
    "report_to": "the recipe's report_to",
    "dataloader_num_workers": "the recipe's workers",
    "train_sampling_strategy": "the stage's sources and mixture",
    "ignore_data_skip": "the stage's data, which resumes where it stood",
    "remove_unused_columns": "the stage's data",
    "label_names": "the stage's data",
    "disable_tqdm": "--progress",
}
"""Fields of TrainingArguments that a recipe says in words of its own, and in which."""


def read_trainer(values: dict[str, Any]) -> dict[str, Any]:
    """The fields as transformers takes them: YAML reads 1e-8 as text.

    Raises:
        ValueError: a field that is said elsewhere in the recipe, or none of TrainingArguments; the nearest is named.
    """
    if not values:
        return {}
    # With it come PEFT and bitsandbytes, where they are, and what they say: each command reads this module.
    from transformers import TrainingArguments

    fields = {field.name: str(field.type) for field in dataclasses.fields(TrainingArguments) if field.init}
    read = dict(values)
    for name, value in values.items():
        if name in OWNED:
            raise ValueError(f"trainer.{name} is said by {OWNED[name]}: set that.")
        if name not in fields:
            near = get_close_matches(str(name), [one for one in fields if one not in OWNED], n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"unknown key 'trainer.{name}', it is no field of transformers' TrainingArguments.{hint}")
        if "float" in fields[name] and isinstance(value, str):
            try:
                read[name] = float(value)
            except ValueError:
                raise ValueError(f"trainer.{name} should be float, it is {value!r}.") from None
    return read
