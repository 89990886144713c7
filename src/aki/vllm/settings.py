"""An engine's configuration under which prompts can be answered under a rule: made so, or refused in a sentence."""

from __future__ import annotations

import logging
from typing import Any

import torch

from aki.vllm.prompts import checked_rule

logger = logging.getLogger("vllm.aki")


class CannotServe(ValueError):
    """vLLM could not answer under the rule, and why."""


def rule_of(vllm_config: Any) -> str | None:
    """The rule that requests of this engine may be under; None: none, now and later.

    With --enable-lora adapters may come that name one, so that their engine is prepared for it.
    """
    model = vllm_config.model_config
    if model is None:
        return None
    rule = getattr(model.hf_config, "attention_rule", None)
    if vllm_config.lora_config is not None and model.is_multimodal_model:
        return rule or "causal"
    return None if rule == "causal" else rule


def own_rule(vllm_config: Any) -> str | None:
    """What a model's own mask opens, which stays open under any rule; None: nothing.

    Raises:
        CannotServe: it opens what no rule of ours does.
    """
    model = vllm_config.model_config
    if not model.is_mm_prefix_lm:
        return None
    if model.hf_config.model_type != "gemma3":
        raise CannotServe(
            f"{model.hf_config.model_type!r} has a mask of its own in which media see more than what is behind them, "
            "and aki does not know in vLLM which: it cannot be served under an attention rule."
        )
    return "image_bidirectional"


def lay(vllm_config: Any) -> None:
    """Make a configuration fit for its rule; one without a rule stays as it is.

    Raises:
        CannotServe: what was asked for cannot be answered under the rule.
        ValueError: there is no such rule.
    """
    rule = rule_of(vllm_config)
    if rule is None:
        return
    checked_rule(rule)
    own_rule(vllm_config)
    _refuse(vllm_config, rule)
    model, scheduler = vllm_config.model_config, vllm_config.scheduler_config
    said = []
    room = model.max_model_len + scheduler.max_num_seqs
    if scheduler.max_num_batched_tokens < room:
        said.append(f"a step takes {room} tokens instead of {scheduler.max_num_batched_tokens}")
        scheduler.max_num_batched_tokens = room
    if getattr(scheduler, "max_num_scheduled_tokens", None):
        scheduler.max_num_scheduled_tokens = max(scheduler.max_num_scheduled_tokens, room)
    scheduler.max_num_encoder_input_tokens = max(scheduler.max_num_encoder_input_tokens, room)
    scheduler.encoder_cache_size = max(scheduler.encoder_cache_size, room)
    if scheduler.long_prefill_token_threshold:
        said.append("--long-prefill-token-threshold is off")
        scheduler.long_prefill_token_threshold = 0
    if vllm_config.compilation_config.pass_config.fuse_attn_quant:
        said.append("attention is not fused with the quantization of its output")
    vllm_config.compilation_config.pass_config.fuse_attn_quant = False
    unreadable = _unreadable_cache(vllm_config)
    if unreadable and vllm_config.cache_config.enable_prefix_caching:
        said.append(f"prefix caching is off, because {unreadable}")
        vllm_config.cache_config.enable_prefix_caching = False
    logger.info(
        "aki: prompts are answered under the rule %r. What a picture is shown with stays in one step%s.",
        rule,
        "".join(f"; {change}" for change in said),
    )


def keeps_prompts_whole(vllm_config: Any) -> bool:
    """Whether all that a rule opens in a prompt is computed in one step, because no cached key can be read."""
    return not vllm_config.cache_config.enable_prefix_caching


def _unreadable_cache(vllm_config: Any) -> str | None:
    from vllm.platforms import current_platform

    cache = str(vllm_config.cache_config.cache_dtype)
    if cache.startswith(("fp8", "int8", "int4", "nvfp4", "turboquant")):
        return f"keys of the cache's type {cache} are not those of the step"
    amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    if current_platform.is_cpu() and vllm_config.model_config.dtype == torch.bfloat16 and amx():
        return "AMX kernels keep keys in tiles"
    return None


def _refuse(vllm_config: Any, rule: str) -> None:
    parallel = vllm_config.parallel_config
    reasons = {
        "this model takes no pictures, videos or audio": not vllm_config.model_config.is_multimodal_model,
        "an encoder-decoder's decoder sees its media by cross-attention": vllm_config.model_config.is_encoder_decoder,
        "speculative decoding may take the end of a prompt for drafted tokens": vllm_config.speculative_config,
        "keys that another engine computed do not say under which question": vllm_config.kv_transfer_config,
        "prompt embeddings do not say what they are": getattr(vllm_config.model_config, "enable_prompt_embeds", False),
        "two half batches overlap": getattr(parallel, "enable_dbo", False),
        "a prompt's keys lie on several GPUs": getattr(parallel, "decode_context_parallel_size", 1) > 1
        or getattr(parallel, "prefill_context_parallel_size", 1) > 1,
    }
    for reason, holds in reasons.items():
        if holds:
            raise CannotServe(
                f"vLLM cannot answer under the attention rule {rule!r}: {reason}. Start it without, or serve the model "
                'causally with --hf-overrides \'{"attention_rule": "causal"}\'.'
            )
