"""The attention rule of a model at work: AKI's, which is a field of its configuration, or an unlocked model's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from aki.attention import get_rule, lock, unlock
from aki.attention.families import underlying_model


def base_model(model: Any) -> PreTrainedModel:
    """The model within PEFT's wrapper, AKI or any other."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base if base.config.model_type == "aki" else underlying_model(base)


def rule_of(model: Any) -> str:
    """The rule of AKI or of an unlocked model; a model that is not unlocked is causal."""
    return _recorded(model) or "causal"


def set_rule(model: Any, processor: Any, attention_rule: str | None) -> None:
    """Give AKI another rule, or unlock any other model with it; None locks that one.

    Raises:
        ValueError: there is no such rule, or it needs what the processor does not have.
    """
    base = base_model(model)
    if attention_rule is None:
        lock(model)
    elif base.config.model_type == "aki":
        base.config.attention_rule = get_rule(attention_rule).name
    else:
        unlock(model, processor, attention_rule)


@contextmanager
def ruled(model: Any, processor: Any, attention_rule: str | None) -> Iterator[str]:
    """Another rule for a while (None: the model's own); gives the name of the one that is in force."""
    before = _recorded(model)
    if attention_rule is None or attention_rule == before:
        yield rule_of(model)
        return
    set_rule(model, processor, attention_rule)
    try:
        yield attention_rule
    finally:
        set_rule(model, processor, before)


def _recorded(model: Any) -> str | None:
    return getattr(base_model(model).config, "attention_rule", None)
