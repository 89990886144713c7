"""What `unlock` needs to know of a model, read from the model itself: its media tokens and the module that decodes."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from aki.layout import AUDIO, IMAGE, VIDEO

MODALITIES = {"image": IMAGE, "video": VIDEO, "audio": AUDIO}
MASKED_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
"""Kinds of layers, in transformers' words, whose mask is over pairs of tokens."""

_WRAPPED = ("_orig_mod", "module", "_fsdp_wrapped_module")
"""What wrappers call the model that they hold."""


class CannotUnlock(ValueError):
    """The model has nothing that a visibility rule could be laid over."""


def unwrapped(model: Any) -> Any:
    """A model without what torch.compile, data-parallel training or DeepSpeed put around it. PEFT's wrapper stays."""
    inner = model
    while inner is not None:
        model, held = inner, getattr(inner, "_modules", {})
        inner = next((held[name] for name in _WRAPPED if held.get(name) is not None), None)
    return model


def makes_own_masks(model: Any) -> bool:
    """As Gemma 3, whose media see each other both ways: such a model has to tell `generate` how."""
    return "create_masks_for_generate" in vars(type(model))


def underlying_model(model: Any) -> PreTrainedModel:
    """The model whose forward takes input_ids and labels: within all wrappers, and of Qwen-Omni the thinker.

    Raises:
        CannotUnlock: it is no model of transformers, or AKI's own.
    """
    model = unwrapped(model)
    if hasattr(model, "get_base_model"):
        model = unwrapped(model.get_base_model())
    model = getattr(model, "thinker", model)
    if not isinstance(model, PreTrainedModel):
        raise CannotUnlock(
            f"{type(model).__name__} is no model of transformers, whose masks and decoders `unlock` knows: pass what "
            "AutoModelForImageTextToText.from_pretrained returns."
        )
    if model.config.model_type == "aki":
        raise CannotUnlock("AKI has its rule in its configuration: set model.config.attention_rule instead.")
    return model


def media_token_ids(config: PreTrainedConfig, processor: Any = None) -> dict[int, int]:
    """Modality -> id of its placeholder, from the configuration (or a part of it), else from the processor.

    Raises:
        CannotUnlock: there are no placeholders.
    """
    parts = [getattr(config, name, None) for name in type(config).sub_configs]
    sources = [config, *parts, *([] if processor is None else [processor])]
    found: dict[int, int] = {}
    for name, modality in MODALITIES.items():
        ids = [getattr(source, f"{name}_token_id", None) for source in sources]
        token_id = next((i for i in ids if i is not None), None)
        if token_id is not None and token_id not in found.values():
            found[modality] = token_id
    if not found:
        raise CannotUnlock(
            f"{config.model_type!r} puts no media tokens among its text (its configuration names no image, video or "
            "audio token): there is nothing that could see the question."
        )
    return found


def text_decoder(model: PreTrainedModel) -> nn.Module:
    """The module that takes the embedded sequence and its mask.

    Raises:
        CannotUnlock: an encoder-decoder or cross-attention model, or layers without a mask over pairs of tokens.
    """
    config, kind = model.config, model.config.model_type
    text_config = config.get_text_config(decoder=True)
    if config.is_encoder_decoder:
        raise CannotUnlock(f"{kind!r} is an encoder-decoder: its encoder sees media and text both ways already.")
    if hasattr(text_config, "cross_attention_layers") or hasattr(config, "cross_layer_interval"):
        raise CannotUnlock(
            f"{kind!r} reads images by cross-attention: no image token stands in the decoder's sequence, so none could "
            "see the question. That takes other weights, not another mask."
        )
    unmasked = set(getattr(text_config, "layer_types", None) or ()) - MASKED_LAYERS
    if unmasked:
        raise CannotUnlock(
            f"{kind!r} has layers of kind {', '.join(sorted(unmasked))}, which have no mask over pairs of tokens: a "
            "rule would hold in some layers and not in others."
        )
    decoder = model.get_decoder()
    if "attention_mask" not in inspect.signature(decoder.forward).parameters:
        raise CannotUnlock(f"the decoder of {kind!r}, {type(decoder).__name__}, takes no attention_mask.")
    return decoder
