"""What becomes of a model of another family that was trained under a rule, where nobody knows the rule."""

from __future__ import annotations

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
