"""What vLLM's `vllm.general_plugins` loads in each of its processes."""

from __future__ import annotations


def register() -> None:
    """Teach vLLM the attention rule, or, where this vLLM is not one that aki knows, to refuse it."""
    from vllm import ModelRegistry

    from aki.vllm import hooks

    for architecture in ("AkiForConditionalGeneration", "AkiModel"):
        ModelRegistry.register_model(architecture, "aki.vllm.model:AkiForVllm")
    try:
        hooks.attach()
    except (hooks.VllmMoved, ImportError) as moved:
        hooks.refuse_rules(str(moved))
