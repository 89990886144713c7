"""Multimodal models that are not AKI's, as they are published: loaded whole, and their parts by the names of AKI's."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoConfig,
    AutoModelForMultimodalLM,
    AutoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)

from aki.attention.families import text_decoder, underlying_model, unwrapped
from aki.models.adapters import adapter_of, rule_of_adapter
from aki.models.configuration import AkiConfig
from aki.models.loading import check_family_before
from aki.models.modeling import AkiForConditionalGeneration
from aki.models.opening import as_stock
from aki.models.processing import AkiProcessor
from aki.models.template_limits import check_templates
from aki.models.weights import check_complete, check_depth, check_finite

_CONNECTOR = re.compile(r"project(or|ion)|connector|merger|align|resampler|newline|^embed_(vision|audio)")
"""What families call the modules between encoder and language model."""
MEDIA_IN_DECODER = "embed_tokens_extend"
"""What Phi-4-multimodal calls its encoders, which are modules of its decoder."""


def described(name: str | Path) -> dict[str, Any]:
    """The configuration of a folder or hub id as it is written; of an adapter that of its model, with its rule."""
    base = adapter_of(name)
    if base is None:
        return PreTrainedConfig.get_config_dict(name)[0]
    rule = rule_of_adapter(name)
    return described(base) | ({} if rule is None else {"attention_rule": rule})


def kind_of(name: str | Path) -> str | None:
    """The `model_type` of a folder or hub id."""
    return described(name).get("model_type")


def _merged(folder: str | Path, dtype: torch.dtype | str, options: dict[str, Any]) -> tuple[PreTrainedModel, Any]:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise RuntimeError(f"{folder} holds an adapter, which PEFT opens: pip install 'aki-mma[adapter]'.") from error
    model, _ = load_any(str(adapter_of(folder)), dtype, **options)
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    with as_stock():
        merged: Any = PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    # PEFT leaves all but what it saved whole frozen.
    for name, parameter in merged.named_parameters():
        parameter.requires_grad_(name in learning)
    rule = rule_of_adapter(folder)
    if rule is not None:
        merged.config.attention_rule = rule
    return merged, AkiProcessor.from_pretrained(folder) if is_aki(merged) else load_other_processor(folder)


def load_any(name: str | Path, dtype: torch.dtype | str = "auto", **options: Any) -> tuple[PreTrainedModel, Any]:
    """A model and its processor, AKI's or another family's, causal where it is another's. Reads safetensors only.

    Args:
        name: a folder or a hub id. An adapter is merged into its model.
        dtype: of the weights; `auto` keeps that of the files.
        options: of `from_pretrained`.

    Raises:
        ValueError: weights are missing or not numbers, or its chat template does not end.
    """
    if adapter_of(name) is not None:
        return _merged(name, dtype, options)
    found, _ = PreTrainedConfig.get_config_dict(name)
    if found.get("model_type") in (AkiConfig.model_type, None):
        chosen: dict[str, Any] = options if dtype == "auto" else {"dtype": dtype, **options}
        return AkiForConditionalGeneration.from_pretrained(name, **chosen), AkiProcessor.from_pretrained(name)
    # On a terminal transformers would ask whether to run the folder's own code.
    closed: dict[str, Any] = {"trust_remote_code": False}
    check_depth(found, name)
    config = AutoConfig.from_pretrained(name, **closed)
    _check_reads_media(name, config)
    processor = load_other_processor(name)
    check_family_before(name, config)
    with as_stock():
        model, info = AutoModelForMultimodalLM.from_pretrained(
            name, use_safetensors=True, dtype=dtype, output_loading_info=True, **closed, **options
        )
    # Weights that they do not take are usual in other families.
    check_complete(name, info["missing_keys"])
    check_finite(name, dict(model.named_parameters()))
    return model, processor


def _check_reads_media(name: str | Path, config: PreTrainedConfig) -> None:
    if type(config) not in MODEL_FOR_MULTIMODAL_LM_MAPPING:
        raise ValueError(
            f"{name} holds a model of type {config.model_type!r}, which reads text alone: name a model that reads "
            "pictures, video or audio, or join this one with an encoder (model.from_backbones in a recipe)."
        )


def load_other_processor(name: str | Path) -> Any:
    """
    Raises:
        ValueError: there is none in the folder, or its chat template does not end.
    """
    try:
        processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
    except OSError as error:
        if not Path(name).is_dir():
            raise
        raise ValueError(
            f"{name} holds no processor that transformers could open: copy that of the model it was made from "
            "(processor_config.json or preprocessor_config.json, tokenizer.json and what else lies there) beside it."
        ) from error
    check_templates(processor)
    return processor


def is_aki(model: Any) -> bool:
    """Whether a model is AKI's own, also within what training puts around it."""
    return getattr(unwrapped(model).config, "model_type", None) == AkiConfig.model_type


def parameters_of(model: Any) -> dict[str, list[nn.Parameter]]:
    """A model's parameters by the part that they belong to, whatever its family calls it.

    Returns:
        vision_encoder (every encoder of media), connector (every one), language_model (with its output layer).

    Raises:
        CannotUnlock: a model in which no rule could be laid.
    """
    found: dict[str, list[nn.Parameter]] = {"vision_encoder": [], "connector": [], "language_model": []}
    base = base_of(model)
    if is_aki(model):
        for name, part in base.parts.items():
            kind = name if name in found else "connector" if name.endswith("connector") else "vision_encoder"
            found[kind] += part.parameters()
        return found
    language = {id(p) for part in _language_parts(base) for p in part.parameters()}
    for name, parameter in base.named_parameters():
        is_connector = any(_CONNECTOR.search(piece) for piece in name.split("."))
        is_text = id(parameter) in language and MEDIA_IN_DECODER not in name.split(".")
        part = "language_model" if is_text else "connector" if is_connector else "vision_encoder"
        found[part].append(parameter)
    return found


def base_of(model: Any) -> Any:
    """The model within all wrappers, PEFT's too."""
    if not is_aki(model):
        return underlying_model(model)
    inner = unwrapped(model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def decoder_path(model: Any) -> str:
    """Where the text decoder is in the model, as `get_submodule` takes it."""
    base = base_of(model)
    decoder = base.model.language_model if is_aki(base) else text_decoder(base)
    return next(name for name, module in base.named_modules() if module is decoder)


def connectors_of(model: Any) -> list[str]:
    """The names of a model's connectors: modules outside of which there are no others, of a list each one in it."""
    base, found = base_of(model), list[str]()
    lists: set[str] = set()
    for name in modules_beside_decoder(model, every=True):
        holder, _, own = name.rpartition(".")
        inside = any(name.startswith(f"{other}.") for other in found)
        if inside or not (holder in lists or _CONNECTOR.search(own)):
            continue
        # What only holds modules has no forward of its own, and PEFT does not take it.
        if isinstance(base.get_submodule(name), nn.ModuleList):
            lists.add(name)
        else:
            found.append(name)
    return found


def modules_beside_decoder(model: Any, every: bool = False) -> list[str]:
    """The names of modules that hold nothing of the text decoder: the outermost, or every one."""
    base, path = base_of(model), decoder_path(model)
    found: list[str] = []
    for name, _ in base.named_modules():
        inside = name.startswith(f"{path}.") and MEDIA_IN_DECODER not in name.split(".")
        holds = not name or path == name or path.startswith(f"{name}.") or inside
        if not holds and (every or not any(name.startswith(f"{other}.") for other in found)):
            found.append(name)
    return found


def model_on_meta(name: str | Path) -> PreTrainedModel:
    """The modules of a model without its weights, of an adapter those of its model."""
    base = adapter_of(name)
    if base is not None:
        return model_on_meta(base)
    config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    is_own = config.model_type == AkiConfig.model_type
    if not is_own:
        _check_reads_media(name, config)
    with torch.device("meta"):
        return AkiForConditionalGeneration(config) if is_own else AutoModelForMultimodalLM.from_config(config)


def takes_logits_to_keep(model: Any) -> bool:
    """Whether its forward computes the logits of chosen positions alone."""
    return "logits_to_keep" in inspect.signature(type(base_of(model)).forward).parameters


def _language_parts(model: PreTrainedModel) -> list[nn.Module]:
    parts = [text_decoder(model), model.get_input_embeddings(), model.get_output_embeddings()]
    return [part for part in parts if part is not None]
