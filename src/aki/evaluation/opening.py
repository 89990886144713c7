"""The model that is measured, and the rule that it is measured under."""

from __future__ import annotations

from typing import Any

import torch

import aki
from aki.attention import BACKENDS, get_rule
from aki.models.adapters import model_of_adapter
from aki.models.other import described, load_any


def load_model(pretrained: str, dtype: str, rule: str | None, unlock: bool, backend: str | None) -> tuple[Any, Any]:
    """Model and processor, whichever kind it is.

    Raises:
        ValueError: no such dtype; a rule for a model that is neither AKI nor unlocked; AKI cannot be unlocked.
    """
    known = getattr(torch, dtype, None)
    if dtype != "auto" and not (isinstance(known, torch.dtype) and known.is_floating_point):
        raise ValueError(f"dtype must be auto or a floating torch dtype such as bfloat16, it is {dtype!r}.")
    with model_of_adapter(pretrained):
        found = described(pretrained)
    kind = found.get("model_type")
    is_aki = kind in (aki.AkiConfig.model_type, None)
    if is_aki and unlock:
        raise ValueError(f"{pretrained} is an AKI model, which has its rule already: leave unlock out.")
    # Saved unlocked, a folder says so.
    unlock = unlock or (not is_aki and "attention_rule" in found)
    if rule is not None and not (is_aki or unlock):
        raise ValueError(f"{pretrained} is a {kind} model: a rule needs unlock=True.")
    implementation: Any = backend
    if is_aki and backend in BACKENDS:
        implementation = {"text_config": backend}
    with model_of_adapter(pretrained):
        model, processor = load_any(pretrained, dtype, attn_implementation=implementation)
    if unlock:
        aki.unlock(model, processor, rule)
    elif rule is not None:
        model.config.attention_rule = get_rule(rule).name
    return model, processor
