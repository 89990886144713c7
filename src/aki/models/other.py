"""Multimodal models that are not AKI's, as they are published: loaded whole, and their parts by the names of AKI's."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForMultimodalLM, AutoProcessor, PreTrainedConfig, PreTrainedModel

from aki.attention.families import text_decoder, underlying_model, unwrapped
from aki.models.configuration import AkiConfig
from aki.models.modeling import AkiForConditionalGeneration
from aki.models.processing import AkiProcessor
from aki.models.template_limits import check_templates
from aki.models.weights import check_complete, check_depth, check_finite

_CONNECTOR = re.compile(r"project(or|ion)|connector|merger|align|resampler|newline|^embed_(vision|audio)")
"""What families call the modules between encoder and language model."""


def kind_of(name: str | Path) -> str | None:
    """The `model_type` of a folder or hub id."""
    return PreTrainedConfig.get_config_dict(name)[0].get("model_type")


def load_any(name: str | Path, dtype: torch.dtype | str = "auto") -> tuple[PreTrainedModel, Any]:
    """A model and its processor, AKI's or another family's, causal where it is another's. Reads safetensors only.

    Args:
        name: a folder or a hub id.
        dtype: of the weights; `auto` keeps that of the files.

    Raises:
        ValueError: weights are missing or not numbers, or its chat template does not end.
    """
    found, _ = PreTrainedConfig.get_config_dict(name)
    if found.get("model_type") in (AkiConfig.model_type, None):
        chosen: dict[str, Any] = {} if dtype == "auto" else {"dtype": dtype}
        return AkiForConditionalGeneration.from_pretrained(name, **chosen), AkiProcessor.from_pretrained(name)
    # On a terminal transformers would ask whether to run the folder's own code.
    closed: dict[str, Any] = {"trust_remote_code": False}
    check_depth(found, name)
    processor = load_other_processor(name)
    model, info = AutoModelForMultimodalLM.from_pretrained(
        name, use_safetensors=True, dtype=dtype, output_loading_info=True, **closed
    )
    # Weights that they do not take are usual in other families.
    check_complete(name, info["missing_keys"])
    check_finite(name, dict(model.named_parameters()))
    return model, processor


def load_other_processor(name: str | Path) -> Any:
    """
    Raises:
        ValueError: its chat template does not end.
    """
    processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
    check_templates(processor)
    return processor


def is_aki(model: Any) -> bool:
    """Whether a model is AKI's own, also within what training puts around it."""
    return getattr(unwrapped(model).config, "model_type", None) == AkiConfig.model_type


def parameters_of(model: Any) -> dict[str, list[nn.Parameter]]:
    """A model's parameters by the part that they belong to, whatever its family calls it.

    Returns:
        vision_encoder (of other families every encoder of media), connector, language_model (with its output layer).

    Raises:
        CannotUnlock: a model in which no rule could be laid.
    """
    if is_aki(model):
        return {name: list(part.parameters()) for name, part in unwrapped(model).parts.items()}
    base = underlying_model(model)
    language = {id(p) for part in _language_parts(base) for p in part.parameters()}
    found: dict[str, list[nn.Parameter]] = {"vision_encoder": [], "connector": [], "language_model": []}
    for name, parameter in base.named_parameters():
        is_connector = any(_CONNECTOR.search(piece) for piece in name.split("."))
        part = "language_model" if id(parameter) in language else "connector" if is_connector else "vision_encoder"
        found[part].append(parameter)
    return found


def takes_logits_to_keep(model: Any) -> bool:
    """Whether its forward computes the logits of chosen positions alone."""
    base = unwrapped(model) if is_aki(model) else underlying_model(model)
    return "logits_to_keep" in inspect.signature(type(base).forward).parameters


def _language_parts(model: PreTrainedModel) -> list[nn.Module]:
    parts = [text_decoder(model), model.get_input_embeddings(), model.get_output_embeddings()]
    return [part for part in parts if part is not None]
