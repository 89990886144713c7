"""A rule's name in what is saved, and what becomes of the model where nobody reads it."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn
from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

FIELD = "attention_rule"
"""Of a configuration, and of an adapter's `auto_mapping`."""
CAUSAL_ELSEWHERE = (
    "What does not know the rule answers causally, without a word: transformers alone, vLLM without aki's plugin, "
    "SGLang, llama.cpp, and TRL's rollouts through such a vLLM."
)
UNDER_THE_RULE = (
    "In transformers `import aki` before from_pretrained; serve with `aki serve`, or with vLLM and aki-mma in one "
    "environment."
)


def on_saving(kind: str, rule: str) -> str:
    """What is said when a model is saved under its family's own model_type.

    Args:
        kind: its class.
        rule: which was laid over it; its name is in what is saved, as `attention_rule`.
    """
    return (
        f"{kind} is about to be saved as a model of its own family, and is under the attention rule {rule!r}, which is "
        f"saved by name alone (attention_rule). {CAUSAL_ELSEWHERE} {UNDER_THE_RULE}"
    )


def recorded_rule(model: nn.Module, base: PreTrainedModel) -> str | None:
    """The rule's name as `record_rule` wrote it, an adapter's before its model's."""
    mappings = [adapter.auto_mapping or {} for adapter in _adapters(model)]
    return next((m[FIELD] for m in mappings if FIELD in m), getattr(base.config, FIELD, None))


def record_rule(model: nn.Module, base: PreTrainedModel, name: str | None) -> None:
    """Write a rule's name where loading finds it; None takes it out.

    An adapter's configuration has one field that takes what PEFT doesn't know: `auto_mapping`.

    Args:
        model: perhaps PEFT's wrapper.
        base: the model in it.
    """
    if name is not None:
        setattr(base.config, FIELD, name)
    elif hasattr(base.config, FIELD):
        delattr(base.config, FIELD)
    for adapter in _adapters(model):
        others = {key: value for key, value in (adapter.auto_mapping or {}).items() if key != FIELD}
        adapter.auto_mapping = (others | ({FIELD: name} if name is not None else {})) or None
        if name is not None and adapter.task_type is None:
            logger.warning(
                "PEFT writes its own auto_mapping over the rule %r when it saves an adapter without a task_type: give "
                "the LoraConfig task_type='CAUSAL_LM', or pass unlock the rule after loading.",
                name,
            )


def _adapters(model: nn.Module) -> list[Any]:
    return [adapter for adapter in getattr(model, "peft_config", {}).values() if hasattr(adapter, "auto_mapping")]
