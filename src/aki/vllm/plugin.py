"""What vLLM's `vllm.general_plugins` loads in each of its processes."""

from __future__ import annotations


def register() -> None:
    """Teach vLLM the attention rule, or, where this vLLM is not one that aki knows, to refuse it."""
    from aki.vllm import hooks

    try:
        hooks.attach()
    except (hooks.VllmMoved, ImportError) as moved:
        hooks.refuse_rules(str(moved))
