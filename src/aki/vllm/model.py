"""AKI in vLLM: its own encoders and connectors, and vLLM's class of whatever decoder it has."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import SupportsLoRA, SupportsMultiModal, SupportsPP
from vllm.model_executor.models.module_mapping import MultiModelKeys
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    WeightsMapper,
    init_vllm_registered_model,
    maybe_prefix,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from aki.models.connectors import connector_of
from aki.models.encoding import encode_media, encoder_of
from aki.models.templates import AUDIO_TOKEN, IMAGE_TOKEN, VIDEO_TOKEN
from aki.vllm.processing import AkiDummyInputs, AkiInVllmProcessor, AkiProcessingInfo

_ENCODING = ("vision_encoder", "connector", "video_encoder", "video_connector", "audio_encoder", "audio_connector")


@MULTIMODAL_REGISTRY.register_processor(AkiInVllmProcessor, info=AkiProcessingInfo, dummy_inputs=AkiDummyInputs)
class AkiForVllm(nn.Module, SupportsMultiModal, SupportsLoRA, SupportsPP):
    """The rule is not its business: it is laid over the decoder's attention layers as for any other model."""

    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}  # noqa: RUF012
    # Folders of before AKI had a backbone of its own have the older names.
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={
            "model.language_model.": "language_model.model.",
            **{f"model.{part}.": f"{part}." for part in _ENCODING},
            "lm_head.": "language_model.lm_head.",
        }
    )
    feature_cache = encoder_dtype = None
    # vLLM's, which no type checker sees where it is not installed.
    configure_mm_token_handling: Any
    _mark_tower_model: Any
    _mark_language_model: Any

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        return {"image": IMAGE_TOKEN, "video": VIDEO_TOKEN, "audio": AUDIO_TOKEN}[modality]

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        self.config = vllm_config.model_config.hf_config
        dtype = vllm_config.model_config.dtype
        media = self.config.media
        self.configure_mm_token_handling(self.config.text_config.vocab_size, [m.token_id for m in media.values()])
        for one in media.values():
            with self._mark_tower_model(vllm_config, one.name.split()[0]):
                self.add_module(one.encoder, encoder_of(AutoModel.from_config(one.encoder_config, dtype=dtype)))
                self.add_module(one.connector, connector_of(one, self.config))
        with self._mark_language_model(vllm_config):
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config,
                hf_config=self.config.text_config,
                architectures=_architectures(self.config.text_config),
                prefix=maybe_prefix(prefix, "language_model"),
            )
        # The published checkpoint's output layer has one, which vLLM's has not.
        size = self.config.text_config.vocab_size
        self.output_bias = nn.Parameter(torch.zeros(size, dtype=dtype)) if self.config.output_bias else None
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

    def embed_multimodal(self, **kwargs: Any) -> list[Tensor]:
        """(embeddings an item, text width) of each item."""
        found: list[Tensor] = []
        for name in self.config.media:
            if kwargs.get(name) is not None:
                found += encode_media(self, name, kwargs[name]).pooler_output.unbind(0)
        return found

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if intermediate_tensors is not None:
            inputs_embeds = None
        return self.language_model.model(input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        logits = self.language_model.compute_logits(hidden_states)
        return logits if logits is None or self.output_bias is None else logits + self.output_bias

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        names = {"lm_head.bias": "output_bias", "language_model.lm_head.bias": "output_bias"}
        loader = AutoWeightsLoader(self)
        renamed = ((names.get(name, name), value) for name, value in weights)
        return loader.load_weights(renamed, mapper=self.hf_to_vllm_mapper)

    def get_mm_mapping(self) -> MultiModelKeys:
        media = self.config.media.values()
        return MultiModelKeys.from_string_field(
            language_model="language_model",
            connector=[m.connector for m in media],
            tower_model=[m.encoder for m in media],
        )


def _architectures(text_config: Any) -> list[str]:
    """A decoder's class, by its configuration: saved AKI folders name their own class alone."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[text_config.model_type]]
