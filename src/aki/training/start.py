"""The model that a stage starts from: whether it is one, and the one that the recipe speaks of."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from aki.attention import unlock
from aki.attention.families import text_decoder
from aki.attention.recorded import record_rule
from aki.models import AkiConfig, AkiForConditionalGeneration, AkiProcessor
from aki.models.adapters import adapter_of, has_model, model_of_adapter
from aki.models.other import base_of, is_aki, kind_of, load_any, load_other_processor
from aki.prompts import write_prompt_blocks
from aki.prompts.blocks import PromptBlockWriter
from aki.prompts.scopes import add_scope_tokens, scope_token_ids
from aki.training.folder import RESULT, RunError, training_folder
from aki.training.model import model_config
from aki.training.recipe import Recipe, RecipeError

_ATTENTION = ("auto", "sdpa", "eager")
"""What other families are trained with; auto is transformers' choice."""
_PROCESSORS = ("processor_config.json", "preprocessor_config.json")
_PARTS = ("vision", "text", "connector")
_TOKENIZERS = ("vocab_size",)
"""What the tokenizer decides, whatever a recipe says."""


def check_start(recipe: Recipe, folder: Path) -> None:
    """
    Raises:
        RunError: the folder holds no whole model, or one of other sizes than the recipe's; they are named.
        RecipeError: the recipe's own sizes make no model.
    """
    if recipe.model.pretrained and not folder.is_dir():
        if folder.is_absolute() or len(folder.parts) > 2:
            raise RunError(f"model.pretrained: there is no folder {folder}, and that is no hub id (OWNER/NAME).")
        return
    if not has_model(folder):
        raise RunError(f"{folder} holds no model to start from: run the stage before it first.")
    if (training_folder(folder) / "run.json").exists() and not (folder / RESULT).exists():
        raise RunError(f"{folder} holds a run that is not finished: go on with it first, with --resume.")
    if recipe.model.pretrained:
        if not any((folder / file).exists() for file in _PROCESSORS):
            raise RunError(
                f"{folder} holds no processor of media; a language model alone is given an encoder by "
                "model.from_backbones."
            )
        return
    if adapter_of(folder) is not None:
        return  # its sizes are those of the model that it names
    kind = kind_of(folder)
    if kind != AkiConfig.model_type:
        raise RunError(
            f"{folder} holds a model of type {kind!r}, not an AKI model to start from: to train it as it is, name it "
            "in model.pretrained, without sizes."
        )
    differences = list(_differences(recipe, AkiConfig.from_pretrained(folder)))
    if differences:
        shown = "; ".join(differences[:3]) + (f", and {len(differences) - 3} more" if len(differences) > 3 else "")
        raise RunError(f"{folder} holds another model than the recipe's: {shown}. Correct the recipe, or --start-from.")


def load_start(
    folder: Path, quantization: BitsAndBytesConfig | None = None
) -> tuple[Any, AkiProcessor | PromptBlockWriter]:
    """What is there, in float32: a stage trains the weights themselves. Another family's processor says where its
    answers are.

    Raises:
        ValueError: no whole model, or a chat template in which no answers could be found.
        CannotUnlock: a model over which no rule could be laid.
    """
    with model_of_adapter(folder):
        options: dict[str, Any] = {} if quantization is None else {"quantization_config": quantization}
        model, processor = load_any(folder, torch.float32, **options)
    if is_aki(model):
        return model, processor
    text_decoder(model)
    return model, _writing_blocks(folder, processor)


def load_processor(folder: str | Path) -> AkiProcessor | PromptBlockWriter:
    """The processor of `load_start`, without a model."""
    with model_of_adapter(folder):
        if kind_of(folder) == AkiConfig.model_type:
            return AkiProcessor.from_pretrained(folder)
        return _writing_blocks(folder, load_other_processor(folder))


def _writing_blocks(folder: str | Path, processor: Any) -> PromptBlockWriter:
    if getattr(processor, "chat_template", None) is None:
        raise ValueError(
            f"the processor in {folder} has no chat template, which says how a chat is written and where its answers "
            "are: write one into chat_template.jinja there."
        )
    return write_prompt_blocks(processor)


def has_scopes(rule: str) -> bool:
    """Whether a rule reads scopes."""
    return "mma_scoped" in rule.split("+")


def learn_scopes(model: Any, processor: AkiProcessor | PromptBlockWriter, adapted: bool) -> None:
    """Let a model and its tokenizer know the tokens of scopes, for a rule that reads them.

    Raises:
        RecipeError: they are new to a model whose own weights stay.
    """
    if add_scope_tokens(processor.tokenizer) and adapted:
        raise RecipeError(
            "the tokens of scopes are new to this model, and below an adapter nothing learns them: train a stage "
            "with mma_scoped and no adapter first, or take another rule."
        )
    ids = scope_token_ids(processor)
    assert ids is not None
    if max(ids) >= model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(processor.tokenizer))
    if is_aki(model):
        model.config.scope_token_ids = ids


def set_rule(model: Any, processor: AkiProcessor | PromptBlockWriter, rule: str, attention: str) -> None:
    """Give a model a stage's rule and the implementation of attention that the recipe names.

    Raises:
        RecipeError: an implementation that is AKI's alone.
        CannotUnlock: a rule that this model does not take.
    """
    if is_aki(model):
        record_rule(model, base_of(model), rule)
        model.set_attn_implementation({"text_config": attention})
        return
    if attention not in _ATTENTION:
        raise RecipeError(
            f"attention: {attention} is AKI's own; a {model.config.model_type} model takes {', '.join(_ATTENTION)}."
        )
    if attention != "auto":
        model.set_attn_implementation(attention)
    unlock(model, processor, rule)


def _differences(recipe: Recipe, found: AkiConfig) -> Iterator[str]:
    """What the recipe says of the model and is not so; where it says nothing, the weights' shapes."""
    wanted = model_config(recipe.model)
    said = False
    for part in _PARTS:
        ours, theirs = (getattr(config, f"{part}_config") for config in (wanted, found))
        for field in getattr(recipe.model, part):
            value, actual = (getattr(config, field, None) for config in (ours, theirs))
            if field not in _TOKENIZERS and value != actual:
                said = True
                yield f"it has {field} {actual}, model.{part} says {value}"
    if said:
        return
    for field in _TOKENIZERS:
        setattr(wanted.text_config, field, getattr(found.text_config, field))
    ours, theirs = _shapes(wanted), _shapes(found)
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            yield f"its {name} is {_shape(theirs.get(name))}, the recipe's {_shape(ours.get(name))}"


def _shapes(config: AkiConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = AkiForConditionalGeneration(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _shape(shape: Any) -> str:
    return "absent" if shape is None else " x ".join(map(str, shape))
