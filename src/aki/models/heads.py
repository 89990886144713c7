"""The output layer of a language model, which stands on AKI's backbone, and what is made of its values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

FACTORS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
"""Fields of configurations by which logits are multiplied (Cohere, Muse, Falcon-H1)."""


def new_head(config: PreTrainedConfig, bias: bool = False) -> nn.Linear:
    """An output layer as the language model of this configuration has it.

    Args:
        bias: whether it has one in any case.
    """
    with torch.device("meta"):
        own = AutoModelForCausalLM.from_config(config).get_output_embeddings()
    return nn.Linear(own.in_features, own.out_features, bias=bias or own.bias is not None)


def scale_logits(logits: Tensor, config: PreTrainedConfig) -> Tensor:
    """What the language model makes of its output layer's values, by the fields of its configuration."""
    for name in FACTORS:
        factor = getattr(config, name, None)
        logits = logits if factor is None else logits * factor
    if getattr(config, "logits_scaling", None) is not None:  # Granite
        logits = logits / config.logits_scaling
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma
    return logits if cap is None else torch.tanh(logits / cap) * cap


@torch.no_grad()
def check_head(language_model: PreTrainedModel, name: str) -> None:
    """Compare one token's logits with the language model's own.

    Raises:
        ValueError: this language model does more to its logits than `scale_logits` knows.
    """
    token = torch.zeros(1, 1, dtype=torch.long, device=language_model.device)
    hidden = language_model.base_model(input_ids=token).last_hidden_state
    ours = scale_logits(language_model.get_output_embeddings()(hidden), language_model.config)
    theirs = language_model(input_ids=token).logits
    if not torch.allclose(ours, theirs, rtol=1e-2, atol=1e-2):
        raise ValueError(
            f"the language model {name} ({type(language_model).__name__}) makes something of its output layer's values "
            "that AKI does not know: its logits would be other ones. Use another language model."
        )


def add_output_bias(head: Any) -> None:
    head.bias = nn.Parameter(head.weight.new_zeros(head.out_features))
