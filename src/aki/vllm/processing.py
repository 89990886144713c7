"""Pictures, videos and audio on their way into vLLM: AKI's own processor prepares them, vLLM keeps account of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import MultiModalDataParser
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
)

from aki.models.configuration import AkiConfig
from aki.models.media import Media
from aki.models.processing import AkiProcessor

_KINDS = {"pixel_values": "image", "pixel_values_videos": "video", "input_features": "audio"}
"""What vLLM calls the media of `AkiConfig.media`."""


class AkiProcessingInfo(BaseProcessingInfo):
    def get_hf_config(self) -> AkiConfig:
        return self.ctx.get_hf_config(AkiConfig)

    def get_hf_processor(self, **kwargs: object) -> AkiProcessor:
        return self.ctx.get_hf_processor(AkiProcessor, **kwargs)

    @property
    def media(self) -> dict[str, Media]:
        return {_KINDS[name]: media for name, media in self.get_hf_config().media.items()}

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return dict.fromkeys(self.media)

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        return {kind: media.tokens_per_item for kind, media in self.media.items()}

    def get_data_parser(self) -> MultiModalDataParser:
        extractor = self.get_hf_processor().audio_extractor
        return MultiModalDataParser(
            target_sr=None if extractor is None else extractor.sampling_rate,
            expected_hidden_size=self._get_expected_hidden_size(),
        )


class AkiDummyInputs(BaseDummyInputsBuilder[AkiProcessingInfo]):
    """The largest inputs there can be, for which vLLM makes room."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        processor = self.info.get_hf_processor()
        return "".join(getattr(processor, f"{kind}_token") * mm_counts.get(kind, 0) for kind in self.info.media)

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Mapping[str, Any]) -> Any:
        data: dict[str, Any] = {}
        for kind, media in self.info.media.items():
            count, options = mm_counts.get(kind, 0), mm_options.get(kind)
            if kind == "audio":
                rate = self.info.get_hf_processor().audio_extractor.sampling_rate
                data[kind] = self._get_dummy_audios(length=rate, num_audios=count, overrides=options)
                continue
            height, width = media.image_size
            size = {"width": width, "height": height, "overrides": options}
            if kind == "image":
                data[kind] = self._get_dummy_images(num_images=count, **size)
            else:
                data[kind] = self._get_dummy_videos(num_videos=count, num_frames=media.frames, **size)
        return data


class AkiInVllmProcessor(BaseMultiModalProcessor[AkiProcessingInfo]):
    def _get_hf_mm_text(self, mm_counts: Mapping[str, int]) -> str:
        return self.dummy_inputs.get_dummy_text(mm_counts)

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]) -> Mapping[str, Any]:
        return {name: MultiModalFieldConfig.batched(kind) for name, kind in _KINDS.items()}

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[PromptReplacement]:
        return [
            PromptReplacement(
                modality=kind, target=[media.token_id], replacement=[media.token_id] * media.tokens_per_item
            )
            for kind, media in self.info.media.items()
        ]
