"""lmms-eval's own model `vllm_chat`, asked as a task says."""

from __future__ import annotations

from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.models.chat.vllm import VLLM

from aki.apps.vllm import overrides
from aki.evaluation.fingerprints import model_fingerprint
from aki.evaluation.lmms import decoding_of, until


class Vllm(VLLM):
    """By itself lmms-eval's allows every answer 4,096 tokens and more, and passes by where a task ends answers.

    Args:
        model: a folder or a hub id.
        rule: an attention rule over what the folder says.
        dtype: as vLLM names it; auto is the checkpoint's.
        batch_size: how many prompts vLLM is given at a time.
        more: options of `vllm.LLM`.
    """

    def __init__(self, model: str, rule: str | None, dtype: str, batch_size: int, **more: Any):
        # lmms-eval's own default runs what code lies in a folder.
        closed = {"trust_remote_code": False}
        super().__init__(model=model, batch_size=batch_size, dtype=dtype, hf_overrides=overrides(rule), **closed | more)
        config = self.client.llm_engine.vllm_config
        opened = config.model_config
        self.settings = {
            "checkpoint": model_fingerprint(model, getattr(opened.hf_config, "_commit_hash", None)),
            "model_type": opened.hf_config.model_type,
            "dtype": str(opened.dtype).removeprefix("torch."),
            "rule": getattr(opened.hf_config, "attention_rule", None) or "causal",
            "unlocked": rule is not None and opened.hf_config.model_type != "aki",
            "backend": "vllm",
            "device": config.device_config.device_type,
            "batch_size": batch_size,
            "limit_new_tokens": None,
        }

    def make_one_request(self, request: Instance) -> tuple[list[dict], dict]:
        messages, params = super().make_one_request(request)
        decoding = decoding_of(request.args[2])
        params["max_tokens"] = decoding["max_new_tokens"]
        if not decoding["do_sample"]:
            params["temperature"] = 0
        return messages, params

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The answers, in the requests' order."""
        answers = super().generate_until(requests)
        pairs = zip(answers, requests, strict=True)
        return [until(answer.text, request.args[2].get("until")) for answer, request in pairs]
