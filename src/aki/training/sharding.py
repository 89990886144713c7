"""Models in shards, of FSDP or of DeepSpeed: what a run then does otherwise than with a whole one in each process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, parse_flag_from_env
from transformers import TrainingArguments
from transformers.integrations.deepspeed import (
    is_deepspeed_available,
    set_hf_deepspeed_config,
    unset_hf_deepspeed_config,
)

from aki.training.data import ResumeError
from aki.training.recipe import RecipeError

_WHOLE, _FSDP, _DEEPSPEED = "whole weights", "shards of FSDP", "shards of DeepSpeed"
_ON_CPU = (DistributedType.NO, DistributedType.MULTI_CPU)


def shards_anything(arguments: TrainingArguments) -> bool:
    """Whether all processes have to meet in every part of the model in each step: in weights, or in gradients."""
    return _kind(arguments) != _WHOLE


def shards_weights(arguments: TrainingArguments) -> bool:
    """Whether a process holds some of the weights alone, so that all have to take part wherever the model is run."""
    kind = _kind(arguments)
    return kind == _FSDP or (kind == _DEEPSPEED and arguments.deepspeed_plugin.zero_stage == 3)


def training_arguments(values: dict[str, Any]) -> TrainingArguments:
    """Those of transformers out of their fields.

    Raises:
        RecipeError: DeepSpeed is not there, would train in another way than the stage says, or has no accelerators.
    """
    if values.get("deepspeed") and not is_deepspeed_available():
        raise RecipeError("trainer.deepspeed needs DeepSpeed: pip install deepspeed.")
    arguments = TrainingArguments(**values)
    if arguments.deepspeed_plugin is not None:
        for name in ("optimizer", "scheduler"):
            if name in arguments.deepspeed_plugin.deepspeed_config:
                raise RecipeError(
                    f"trainer.deepspeed: its {name} would be used instead of the stage's: take it out of there."
                )
    if arguments.deepspeed_plugin is not None and arguments.distributed_state.distributed_type in _ON_CPU:
        raise RecipeError(
            "trainer.deepspeed needs accelerators: on CPU accelerate connects processes for plain data parallel "
            "training alone. Take it out of the recipe there."
        )
    return arguments


def check_resumes(checkpoint: Path | None, arguments: TrainingArguments) -> None:
    """Whether as many processes as there are, with what each is to hold, go on from a checkpoint.

    Raises:
        ResumeError: a checkpoint in shards that do not fit this number of processes.
    """
    if checkpoint is None:
        return
    then, now = _kind_of(checkpoint), _kind(arguments)
    ranks = len(list(checkpoint.glob("unlogged-*.json")))
    if then != now or (now == _DEEPSPEED and ranks != arguments.world_size):
        raise ResumeError(
            f"{checkpoint} holds {then} of {ranks} process(es), and {arguments.world_size} process(es) with {now} "
            f"cannot go on from them: start {ranks} again."
        )


@contextmanager
def whole_models(arguments: TrainingArguments) -> Iterator[None]:
    """Load whole models, where transformers would shard each as it is made, also those that only count their weights.

    The Trainer shards the one that is trained.
    """
    plugin = arguments.deepspeed_plugin
    config = getattr(arguments, "hf_deepspeed_config", None) or getattr(plugin, "dschf", None)
    if config is None:
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(config)


def keep_loss(plugin: FullyShardedDataParallelPlugin) -> None:
    """Leave outputs as the model makes them: accelerate has them rounded, and so the loss is one of three digits."""
    if hasattr(plugin.mixed_precision_policy, "output_dtype"):  # FSDP2's
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)


def complete_states(optimizer: torch.optim.Optimizer) -> None:
    """Begin the states of trained parameters that no loss has reached yet (a pooling head's), which FSDP asks for when
    it resumes.

    By a step of theirs alone, without gradients, at a rate of 0, as torch begins those of all.
    """
    missing = [
        parameter
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.requires_grad and parameter not in optimizer.state
    ]
    if not missing:
        return
    rates = [group["lr"] for group in optimizer.param_groups]
    for parameter in missing:
        parameter.grad = torch.zeros_like(parameter)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = torch.zeros_like(rate) if isinstance(rate, torch.Tensor) else 0.0
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for parameter in missing:
        parameter.grad = None


def _kind(arguments: TrainingArguments) -> str:
    if arguments.deepspeed_plugin is not None:
        return _DEEPSPEED
    asked = bool(arguments.fsdp) or parse_flag_from_env("ACCELERATE_USE_FSDP")
    return _FSDP if asked and arguments.distributed_state.distributed_type not in _ON_CPU else _WHOLE


def _kind_of(checkpoint: Path) -> str:
    """By the files that the Trainer writes."""
    if (checkpoint / "latest").exists():
        return _DEEPSPEED
    return _FSDP if any(checkpoint.glob("pytorch_model_fsdp*")) else _WHOLE
