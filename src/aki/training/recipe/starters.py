"""Recipes to start from: the values that a user has to think about; all other fields stand beside them, as comments."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

from aki.training.recipe.describe import REQUIRED, Described, as_yaml, described
from aki.training.recipe.run import Recipe

_WIDTH = 120

_MESSAGES = {"kind": "messages", "annotations": ["train.jsonl"], "images": ["images"]}
_ASKED = {"kind": "messages", "annotations": ["held-out.jsonl"], "images": ["images"]}
_TRAINED = {"pretrained": "llava-hf/llava-1.5-7b-hf"}
_SFT = {"rule": "mma", "epochs": 1.0, "batch_size": 4, "learning_rate": 2e-5, "max_length": 2048}
_SFT |= {"eval_every": 200, "save_every": 200, "sources": [_MESSAGES]}
_NEW = {
    "vision": {
        "model_type": "siglip_vision_model",
        "image_size": 384,
        "patch_size": 14,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
    },
    "text": {
        "model_type": "phi3",
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 131072,
    },
    "connector": {"connector": "perceiver_resampler", "num_latents": 144},
    "from_backbones": {
        "vision": "google/siglip-so400m-patch14-384",
        "text": "microsoft/Phi-3.5-mini-instruct",
    },
}

STARTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": (
        "An adapter on a trained model, under MMA, on your own chats.",
        {
            "name": "my-lora",
            "model": _TRAINED,
            "data": {"held_out": [_ASKED]},
            "sft": _SFT | {"learning_rate": 1e-4, "weight_decay": 0.0},
            "adapter": {"kind": "lora", "r": 16, "alpha": 32},
            "trainer": {"gradient_checkpointing": True},
            "bf16": True,
        },
    ),
    "sft": (
        "A trained model under MMA, all of it, on your own chats.",
        {
            "name": "my-sft",
            "model": _TRAINED,
            "data": {"held_out": [_ASKED]},
            "sft": _SFT | {"frozen": ["vision_encoder"]},
            "trainer": {"gradient_checkpointing": True},
            "bf16": True,
        },
    ),
    "compare": (
        "Does MMA help on your data? Rows from the same weights: aki compare FILE --seeds 3 --output runs/mine",
        {
            "name": "my-comparison",
            "model": _TRAINED,
            "data": {"held_out": [_ASKED]},
            "sft": _SFT | {"learning_rate": 1e-4, "eval_every": 0},
            "adapter": {"kind": "lora", "r": 16, "alpha": 32},
            "bf16": True,
            "rows": {"causal": {"sft": {"rule": "causal"}}, "mma": {"sft": {"rule": "mma"}}},
        },
    ),
    "pretrain": (
        "A new model of two trained backbones: its connector and language model learn captions, causally.",
        {
            "name": "my-pretraining",
            "model": _NEW,
            "pretrain": {
                "rule": "causal",
                "steps": 50000,
                "batch_size": 8,
                "learning_rate": 1e-4,
                "frozen": ["vision_encoder"],
                "max_length": 271,
                "shards": [{"kind": "kale", "urls": ["kale/{000000..000099}.tar"]}],
            },
            "bf16": True,
        },
    ),
}


def starter(purpose: str) -> str:
    """A whole recipe as YAML: what it sets, and each other field with its default behind a comment sign."""
    title, values = STARTERS[purpose]
    head = textwrap.wrap(f"{title} Behind a # stands what is by default: take the sign away to set it.", _WIDTH - 2)
    return "\n".join([*(f"# {line}" for line in head), *_mapping(Recipe, values, "")]) + "\n"


def _mapping(kind: type, values: dict[str, Any] | None, indent: str) -> Iterator[str]:
    """
    Args:
        values: None for a group that is not set, all of which is comments.
    """
    for one in described(kind):
        if values is not None and one.name in values:
            yield from _set(one, values[one.name], indent)
        else:
            yield from _unset(one, indent)


def _set(one: Described, value: Any, indent: str) -> Iterator[str]:
    if one.part is None:
        if isinstance(value, dict) and len(value) > 1:
            yield from _line(f"{indent}{one.name}:", one.meaning)
            yield from (f"{indent}  {key}: {as_yaml(inner)}" for key, inner in value.items())
        else:
            yield from _line(f"{indent}{one.name}: {as_yaml(value)}", one.meaning)
        return
    yield from _line(f"{indent}{one.name}:", one.meaning)
    if isinstance(value, list):
        for item in value:
            first, *rest = _mapping(one.part, item, f"{indent}    ")
            yield from (f"{indent}  - {first.strip()}", *rest)
    else:
        yield from _mapping(one.part, value, f"{indent}  ")


def _unset(one: Described, indent: str) -> Iterator[str]:
    shown = "" if one.default == REQUIRED else f" {one.default}".rstrip()
    yield from _line(f"{indent}# {one.name}:{shown}", one.meaning)


def _line(text: str, meaning: str) -> Iterator[str]:
    """The text with its meaning behind it, or above it where both are too long for a line."""
    if len(text) + len(meaning) + 4 <= _WIDTH:
        yield f"{text}  # {meaning}"
        return
    indent = text[: len(text) - len(text.lstrip())]
    yield from (f"{indent}# {line}" for line in textwrap.wrap(meaning, _WIDTH - len(indent) - 2))
    yield text
