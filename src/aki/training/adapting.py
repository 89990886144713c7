"""What a recipe trains beside frozen weights: an adapter of PEFT, over whole or quantised weights."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from aki.models.other import (
    MEDIA_IN_DECODER,
    base_of,
    connectors_of,
    decoder_path,
    model_on_meta,
    modules_beside_decoder,
    parameters_of,
)
from aki.training.recipe import (
    KINDS_OF_ADAPTERS,
    AdapterRecipe,
    QuantizationRecipe,
    Recipe,
    RecipeError,
    StageRecipe,
    known,
)

_EVERY = "all-linear"
"""PEFT's word for every linear layer but the output layer."""


def with_adapter(model: Any, recipe: AdapterRecipe, belongs_to: str | None) -> Any:
    """The model in PEFT's wrapper, in which the adapter and `modules_to_save` alone are trained.

    Args:
        belongs_to: folder or hub id of the model, which the adapter's folder names; None for counting.

    Raises:
        RecipeError: PEFT is not there, or does not take these fields; or the model has no module of a name.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise RecipeError("adapter needs PEFT: pip install 'aki-mma[adapter]'.") from error
    saved = [name for one in recipe.modules_to_save for name in _modules_to_save(model, one)]
    for name in recipe.target_modules:
        _check_target(model, name)
    targets = list(recipe.target_modules) or language_linears(model)
    try:
        config = LoraConfig(
            # With one, what is written into auto_mapping (the rule) stays there.
            task_type="CAUSAL_LM",
            r=recipe.r,
            lora_alpha=recipe.alpha,
            lora_dropout=recipe.dropout,
            target_modules=_EVERY if _EVERY in recipe.target_modules else targets,
            modules_to_save=saved or None,
            base_model_name_or_path=belongs_to,
            **KINDS_OF_ADAPTERS[recipe.kind],
            **recipe.options,
        )
        wrapped = get_peft_model(model, config)
        # PEFT puts the name that the weights were first loaded by, which is not that of a merged adapter's folder.
        config.base_model_name_or_path = belongs_to
        return wrapped
    except (TypeError, ValueError) as error:
        raise RecipeError(f"PEFT does not take this adapter: {error}") from error


def _modules_to_save(model: nn.Module, name: str) -> list[str]:
    """PEFT passes over a name that no module ends with."""
    if name == "connector":
        if not (found := connectors_of(model)):
            raise RecipeError("adapter.modules_to_save: no module here could be told to be the connector: name it.")
        return found
    modules = [one for one, _ in base_of(model).named_modules()]
    if not any(one.endswith(name) for one in modules):
        ends = {one.rpartition(".")[2] for one in modules if not one.rpartition(".")[2].isdigit()}
        known("module", name, {"connector", *ends}, "adapter.modules_to_save")
    return [name]


def _check_target(model: nn.Module, name: str) -> None:
    """PEFT passes over a name that is in no model, as long as another is."""
    modules = [one for one, _ in base_of(model).named_modules()]
    if name != _EVERY and not any(one == name or one.endswith(f".{name}") for one in modules):
        ends = {one.rpartition(".")[2] for one in modules if not one.rpartition(".")[2].isdigit()}
        known("module", name, ends - {""}, "adapter.target_modules")


def freeze(model: Any, recipe: Recipe, stage: StageRecipe) -> None:
    """Let the parts that a stage names stay as they are.

    Raises:
        RecipeError: the adapter is in one of them.
    """
    parts = parameters_of(model)
    for part in stage.frozen:
        if recipe.adapter is not None and any(parameter.requires_grad for parameter in parts[part]):
            raise RecipeError(
                f"frozen names {part}, where the adapter would be trained: below an adapter a model's own weights stay "
                "as they are, so leave it out of frozen."
            )
        for parameter in parts[part]:
            parameter.requires_grad_(False)


def language_linears(model: nn.Module) -> str:
    """A regular expression for the linear layers of a model's language model, as PEFT's `target_modules` takes it."""
    path = decoder_path(model)
    decoder = base_of(model).get_submodule(path)
    leaves = {name.rpartition(".")[2] for name, module in decoder.named_modules() if isinstance(module, nn.Linear)}
    return rf"{re.escape(path)}\.(?!{MEDIA_IN_DECODER}\.).*\b({'|'.join(sorted(leaves))})"


def quantization_config(recipe: QuantizationRecipe, folder: str, bf16: bool) -> BitsAndBytesConfig:
    """Of the language model's layers; encoders and connectors stay as they are.

    Raises:
        RecipeError: bitsandbytes is not there.
    """
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise RecipeError("quantization needs bitsandbytes: pip install bitsandbytes.") from error
    kept = ["lm_head", *modules_beside_decoder(model_on_meta(folder))]
    if recipe.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if bf16 else torch.float32,
        llm_int8_skip_modules=kept,
    )
