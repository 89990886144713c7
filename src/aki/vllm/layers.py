"""vLLM's attention layers, which call their own kernel and then do the rows again that see more."""

from __future__ import annotations

from typing import Any

from aki.vllm.settings import CannotServe
from aki.vllm.steps import Steps


def lay_layers(vllm_config: Any, steps: Steps) -> list[str]:
    """Lay the rule over every attention layer of a decoder; gives their names.

    Raises:
        CannotServe: a layer cannot do rows again, and why.
    """
    from vllm.config import CUDAGraphMode
    from vllm.model_executor.layers.attention import Attention
    from vllm.v1.attention.backend import AttentionType

    compilation = vllm_config.compilation_config
    if compilation.cudagraph_mode is not None and compilation.cudagraph_mode.mixed_mode() == CUDAGraphMode.FULL:
        raise CannotServe(
            "a full CUDA graph over mixed batches leaves no room for the attention rule: start vLLM with "
            '--compilation-config \'{"cudagraph_mode": "FULL_AND_PIECEWISE"}\'.'
        )
    laid = []
    for name, layer in compilation.static_forward_context.items():
        kind = getattr(layer, "attn_type", AttentionType.DECODER)
        if kind in (AttentionType.ENCODER, AttentionType.ENCODER_ONLY) or not hasattr(layer, "impl"):
            continue
        if type(layer) is not Attention or kind != AttentionType.DECODER:
            raise CannotServe(
                f"the layer {name} is a {type(layer).__name__}, whose rows cannot be done again: this model cannot be "
                "served by vLLM under an attention rule."
            )
        _check(name, layer)
        _lay(layer, steps)
        laid.append(name)
    if not laid:
        raise CannotServe(
            "no attention layer of vLLM was found in this model, so no attention rule can be laid over it."
        )
    return laid


def _check(name: str, layer: Any) -> None:
    reasons = {
        "its queries come quantized": layer.query_quant is not None,
        "it adds a bias of positions to its scores": getattr(layer.impl, "alibi_slopes", None) is not None,
        "it takes its keys from another layer": layer.kv_sharing_target_layer_name is not None,
    }
    for reason, holds in reasons.items():
        if holds:
            raise CannotServe(f"the rows of the layer {name} cannot be done again under an attention rule: {reason}.")


def _lay(layer: Any, steps: Steps) -> None:
    native = layer.impl.forward

    def forward(owner: Any, query: Any, key: Any, value: Any, kv_cache: Any, metadata: Any, output: Any, **more: Any):
        result = native(owner, query, key, value, kv_cache, metadata, output=output, **more)
        if steps.is_open and metadata is not None:
            if more.get("output_scale") is not None or more.get("output_block_scale") is not None:
                raise RuntimeError("the output of attention comes quantized, which no row can be written over.")
            steps.redo(layer, query, key, value, kv_cache, metadata, output)
        return result

    layer.impl.forward = forward
