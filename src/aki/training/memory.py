"""What a process holds while it trains, by formulas that are stated."""

from __future__ import annotations

from typing import Any

from torch import nn

from aki.models.other import MEDIA_IN_DECODER, base_of, decoder_path
from aki.training.recipe import Recipe, StageRecipe

MEMORY_FORMULA = (
    "4 bytes a parameter and 4 + 8 where it is trained (gradient, AdamW; an 8-bit one 2), over the processes under "
    "FSDP, which gathers in compute precision its largest layer and what is in no layer; of quantised weights 0.5 or 1 "
    "byte and their scales; activations of the language model, 34 bytes x batch x tokens x width x layers in 16 bits, "
    "twice that in 32 (Korthikanti et al., 2022, without attention scores), with gradient checkpointing those of one "
    "layer and each layer's input; 10 bytes a text token's logit; without fragmentation and CUDA's own"
)
_QUANTISED = {4: 0.5 + 1 / 64 + 4 / (64 * 256), 8: 1.0}
"""Bytes a weight: in 4 bits a scale of a byte each 64, of which 256 have one of float32 (Dettmers et al., 2023)."""


def memory_of(
    model: nn.Module, recipe: Recipe, stage: StageRecipe, tokens: int, text_tokens: int, processes: int
) -> dict[str, float]:
    """Part of it -> bytes on each process.

    Args:
        model: without weights, its adapter put on; what is trained requires gradients.
        tokens: a row's, of which text_tokens have logits.
    """
    text: Any = base_of(model).config.get_text_config()
    shards = processes if recipe.fsdp is not None else 1
    everything = _count(model)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    element = 2 if recipe.bf16 else 4
    rows = stage.batch_size * stage.copies
    wrapped = (recipe.fsdp or {}).get("transformer_layer_cls_to_wrap", ())
    layers = [_count(module) for module in model.modules() if type(module).__name__ in wrapped]
    hidden = element * rows * tokens * text.hidden_size
    deep = text.num_hidden_layers
    optimizer = 2 if "8bit" in str(recipe.trainer.get("optim", "")) else 8
    return {
        "weights": weight_bytes(model, recipe.quantization.bits if recipe.quantization else None) / shards,
        "gradients": 4 * trained / shards,
        "AdamW": optimizer * trained / shards,
        "gathered": element * (everything - sum(layers) + max(layers, default=0)) if shards > 1 else 0,
        "activations": hidden * (17.0 + deep if checkpoints(recipe) else 17.0 * deep),
        "logits": 10.0 * rows * text_tokens * text.vocab_size,
    }


def checkpoints(recipe: Recipe) -> bool:
    """Whether activations are computed again on the way back."""
    # transformers takes it by either name.
    return any(recipe.trainer.get(name) for name in ("gradient_checkpointing", "activation_checkpointing"))


def weight_bytes(model: nn.Module, bits: int | None) -> float:
    """In float32, but for the language model's linear layers where they are quantised.

    Args:
        bits: of those, 4 or 8; None keeps them whole.
    """
    whole = 4.0 * _count(model)
    if bits is None:
        return whole
    linear = _decoder_linears(model)
    numbers = sum(layer.weight.numel() for layer in linear)
    scales = 4.0 * sum(layer.out_features for layer in linear) if bits == 8 else 0.0
    return whole - 4.0 * numbers + _QUANTISED[bits] * numbers + scales


def _decoder_linears(model: nn.Module) -> list[nn.Linear]:
    """Those of the language model itself, without what an adapter puts beside them."""
    decoder = base_of(model).get_submodule(decoder_path(model))
    return [
        module
        for name, module in decoder.named_modules()
        if isinstance(module, nn.Linear) and MEDIA_IN_DECODER not in name.split(".") and "lora_" not in name
    ]


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
