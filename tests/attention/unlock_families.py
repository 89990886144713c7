"""One tiny model with random weights for each family that `unlock` is verified on.

Ids below 20 are text; media placeholders are 20 (image), 21 (video) and 22 (audio).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PreTrainedModel,
)

IMAGE_ID, VIDEO_ID, AUDIO_ID = 20, 21, 22
VOCAB = 40
ROWS = 2
MODALITY_OF = {IMAGE_ID: 1, VIDEO_ID: 2, AUDIO_ID: 3}


@dataclass
class Family:
    """How to build one.

    Attributes:
        runs: (placeholder id, how many) in the order in which a row has them.
        media: inputs for ROWS rows, which all have the same runs.
        token_types: the name of the input in which the family wants to be told what is media, if any.
        around: placeholder id -> the tokens that the family wants before and after such a run.
        mrope: position ids have several axes and are computed from the 2-D mask.
        window: of the layers that have one.
        own: what the family's own mask is: causal, or also both ways within an image, or within the whole prefix.
    """

    model: PreTrainedModel
    runs: list[tuple[int, int]]
    media: dict[str, Tensor]
    token_types: str | None = None
    around: dict[int, tuple[int, int]] = field(default_factory=dict)
    mrope: bool = False
    window: int | None = None
    own: str = "causal"


TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


def build(config: Any, auto: Any = AutoModelForImageTextToText) -> PreTrainedModel:
    torch.manual_seed(0)
    model = auto.from_config(config, attn_implementation="sdpa").eval()
    # Larger than an initialisation would be, so that what a token sees changes what it says.
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.2)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    model.generation_config.suppress_tokens = list(range(20, 27))
    return model


def pixels(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def llava() -> Family:
    config = AutoConfig.for_model(
        "llava",
        text_config={"model_type": "llama", **TEXT},
        vision_config={"model_type": "clip_vision_model", **VISION},
        image_token_index=IMAGE_ID,
    )
    return Family(build(config), [(IMAGE_ID, 4)], {"pixel_values": pixels(ROWS, 3, 16, 16)})


def llava_onevision() -> Family:
    config = AutoConfig.for_model(
        "llava_onevision",
        text_config={"model_type": "qwen2", **TEXT},
        vision_config={"model_type": "siglip_vision_model", **VISION, "vision_use_head": False},
        image_token_index=IMAGE_ID,
        video_token_index=VIDEO_ID,
        image_grid_pinpoints=[[16, 16]],
    )
    media = {
        "pixel_values": pixels(ROWS, 2, 3, 16, 16),
        "image_sizes": torch.tensor([[16, 16]] * ROWS),
        "pixel_values_videos": pixels(ROWS, 3, 3, 16, 16),
    }
    # Image: the whole and one tile of 2 x 2 patches, a newline a row of the tile. Video: three frames, pooled to one
    # patch each, and a newline.
    return Family(build(config), [(IMAGE_ID, 10), (VIDEO_ID, 4)], media)


def qwen_vision(**more: Any) -> dict[str, Any]:
    sizes = {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4}
    return {**sizes, "temporal_patch_size": 2, "spatial_merge_size": 2, "out_hidden_size": 32, **more}


QWEN_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
QWEN_MEDIA = {
    "pixel_values": (ROWS * 16, 96),
    "pixel_values_videos": (ROWS * 32, 96),
}


def qwen_media() -> dict[str, Tensor]:
    grids = {"image_grid_thw": [[1, 4, 4]] * ROWS, "video_grid_thw": [[2, 4, 4]] * ROWS}
    values = {name: pixels(*shape) for name, shape in QWEN_MEDIA.items()}
    return values | {name: torch.tensor(grid) for name, grid in grids.items()}


def qwen2_5_vl() -> Family:
    config = AutoConfig.for_model(
        "qwen2_5_vl",
        text_config={
            **TEXT,
            "rope_parameters": QWEN_ROPE,
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 1,
        },
        vision_config=qwen_vision(window_size=8, fullatt_block_indexes=[1]),
        image_token_id=IMAGE_ID,
        video_token_id=VIDEO_ID,
        vision_start_token_id=23,
        vision_end_token_id=24,
    )
    runs = [(IMAGE_ID, 4), (VIDEO_ID, 8)]
    return Family(build(config), runs, qwen_media(), token_types="mm_token_type_ids", mrope=True, window=4)


def qwen3_vl() -> Family:
    config = AutoConfig.for_model(
        "qwen3_vl",
        text_config={**TEXT, "head_dim": 8, "rope_parameters": QWEN_ROPE},
        vision_config=qwen_vision(deepstack_visual_indexes=[0], num_position_embeddings=16),
        image_token_id=IMAGE_ID,
        video_token_id=VIDEO_ID,
        vision_start_token_id=23,
        vision_end_token_id=24,
    )
    # A video's frames stand apart, each after its time stamp.
    runs = [(IMAGE_ID, 4), (VIDEO_ID, 4), (VIDEO_ID, 4)]
    return Family(build(config), runs, qwen_media(), token_types="mm_token_type_ids", mrope=True)


def qwen2_5_omni() -> Family:
    config = AutoConfig.for_model(
        "qwen2_5_omni_thinker",
        text_config={**TEXT, "rope_parameters": QWEN_ROPE},
        vision_config=qwen_vision(window_size=8, fullatt_block_indexes=[1]),
        audio_config={**AUDIO, "n_window": 10, "output_dim": 32},
        image_token_index=IMAGE_ID,
        video_token_index=VIDEO_ID,
        audio_token_index=AUDIO_ID,
        vision_start_token_id=23,
        vision_end_token_id=24,
        audio_start_token_id=25,
        audio_end_token_id=26,
        pad_token_id=0,
    )
    audio = {"input_features": pixels(ROWS, 8, 40), "feature_attention_mask": torch.ones(ROWS, 40, dtype=torch.long)}
    around = {AUDIO_ID: (25, 26), IMAGE_ID: (23, 24)}
    media = {name: value for name, value in qwen_media().items() if "video" not in name}
    runs = [(AUDIO_ID, 10), (IMAGE_ID, 4)]
    model = build(config, AutoModelForMultimodalLM)
    return Family(model, runs, {**media, **audio}, around=around, mrope=True)


def smolvlm(model_type: str) -> Family:
    config = AutoConfig.for_model(
        model_type,
        text_config={"model_type": "llama", **TEXT},
        vision_config={**VISION, "patch_size": 4},
        image_token_id=IMAGE_ID,
        scale_factor=2,
        pad_token_id=0,
    )
    # Two pictures a row, with text between them.
    return Family(build(config), [(IMAGE_ID, 4)] * 2, {"pixel_values": pixels(ROWS, 2, 3, 16, 16)})


def internvl() -> Family:
    config = AutoConfig.for_model(
        "internvl",
        text_config={"model_type": "qwen2", **TEXT},
        vision_config={**VISION, "image_size": [16, 16], "patch_size": [4, 4]},
        image_token_id=IMAGE_ID,
        image_seq_length=4,
    )
    return Family(build(config), [(IMAGE_ID, 4)], {"pixel_values": pixels(ROWS, 3, 16, 16)})


def gemma3() -> Family:
    layers = ["sliding_attention", "full_attention"]
    config = AutoConfig.for_model(
        "gemma3",
        text_config={**TEXT, "head_dim": 8, "sliding_window": 4, "layer_types": layers},
        vision_config={"model_type": "siglip_vision_model", **VISION, "patch_size": 4, "vision_use_head": False},
        image_token_index=IMAGE_ID,
        mm_tokens_per_image=4,
    )
    media = {"pixel_values": pixels(ROWS, 3, 16, 16)}
    return Family(build(config), [(IMAGE_ID, 4)], media, token_types="token_type_ids", window=4, own="image")


def gemma4() -> Family:
    layers = ["sliding_attention", "full_attention"]
    small = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB, "num_kv_shared_layers": 0}
    vision = {"patch_size": 4, "head_dim": 8, "num_key_value_heads": 2, "pooling_kernel_size": 2}
    config = AutoConfig.for_model(
        "gemma4",
        text_config={**TEXT, **small, "head_dim": 8, "global_head_dim": 8, "sliding_window": 4, "layer_types": layers},
        vision_config={**VISION, **vision, "global_head_dim": 8, "position_embedding_size": 16},
        image_token_id=IMAGE_ID,
        video_token_id=VIDEO_ID,
        audio_token_id=AUDIO_ID,
        audio_config=None,
    )
    # Patches of 4 x 4 pixels, and where each stands.
    places = torch.cartesian_prod(torch.arange(4), torch.arange(4)).flip(1)
    media = {"pixel_values": pixels(ROWS, 16, 48), "image_position_ids": places.repeat(ROWS, 1, 1)}
    return Family(build(config), [(IMAGE_ID, 4)], media, token_types="mm_token_type_ids", window=4)


def paligemma() -> Family:
    config = AutoConfig.for_model(
        "paligemma",
        text_config={"model_type": "gemma", **TEXT, "head_dim": 8},
        vision_config={"model_type": "siglip_vision_model", **VISION, "vision_use_head": False, "projection_dim": 32},
        image_token_index=IMAGE_ID,
        projection_dim=32,
        hidden_size=32,
    )
    return Family(build(config), [(IMAGE_ID, 4)], {"pixel_values": pixels(ROWS, 3, 16, 16)})


def paligemma_prefix() -> Family:
    """With token types its own mask is already bidirectional over the whole prompt, so that the rule adds nothing."""
    family = paligemma()
    family.token_types, family.own = "token_type_ids", "prefix"
    return family


def mistral3() -> Family:
    config = AutoConfig.for_model(
        "mistral3",
        text_config={"model_type": "mistral", **TEXT, "head_dim": 8, "sliding_window": 4},
        vision_config={"model_type": "pixtral", **VISION, "patch_size": 4},
        image_token_index=IMAGE_ID,
        spatial_merge_size=2,
    )
    media = {"pixel_values": pixels(ROWS, 3, 16, 16), "image_sizes": torch.tensor([[16, 16]] * ROWS)}
    return Family(build(config), [(IMAGE_ID, 4)], media, window=4)


def pixtral() -> Family:
    config = AutoConfig.for_model(
        "llava",
        text_config={"model_type": "mistral", **TEXT, "head_dim": 8, "sliding_window": None},
        vision_config={"model_type": "pixtral", **VISION},
        image_token_index=IMAGE_ID,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    media = {"pixel_values": pixels(ROWS, 3, 16, 16), "image_sizes": torch.tensor([[16, 16]] * ROWS)}
    return Family(build(config), [(IMAGE_ID, 4)], media)


def phi4_multimodal() -> Family:
    config = AutoConfig.for_model(
        "phi4_multimodal",
        **TEXT,
        original_max_position_embeddings=256,
        vision_config={**VISION, "patch_size": 4, "crop_size": 16, "image_token_id": IMAGE_ID},
        audio_config={
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_blocks": 2,
            "num_attention_heads": 2,
            "ext_pw_out_channel": 16,
            "depthwise_separable_out_channel": 16,
            "nemo_conv_channels": 8,
            "input_size": 16,
            "audio_token_id": AUDIO_ID,
        },
    )
    media = {
        "image_pixel_values": pixels(ROWS, 2, 3, 16, 16),
        "image_sizes": torch.tensor([[16, 16]] * ROWS),
        "image_attention_mask": torch.ones(ROWS, 2, 4, 4),
        "audio_input_features": pixels(ROWS, 32, 16),
        "audio_embed_sizes": torch.tensor([4] * ROWS),
    }
    # One tile and the whole, 2 x 2 with a newline a row, and a separator.
    return Family(build(config, AutoModelForCausalLM), [(IMAGE_ID, 13), (AUDIO_ID, 4)], media)


AUDIO = {
    "num_mel_bins": 8,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "d_model": 16,
    "max_source_positions": 20,
}


def qwen2_audio() -> Family:
    config = AutoConfig.for_model(
        "qwen2_audio",
        text_config={"model_type": "qwen2", **TEXT},
        audio_config={"model_type": "qwen2_audio_encoder", **AUDIO},
        audio_token_index=AUDIO_ID,
    )
    media = {"input_features": pixels(ROWS, 8, 40), "feature_attention_mask": torch.ones(ROWS, 40, dtype=torch.long)}
    return Family(build(config, AutoModelForMultimodalLM), [(AUDIO_ID, 10)], media)


def voxtral() -> Family:
    config = AutoConfig.for_model(
        "voxtral",
        text_config={"model_type": "llama", **TEXT},
        audio_config={
            "hidden_size": 16,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_mel_bins": 8,
            "max_source_positions": 20,
        },
        audio_token_id=AUDIO_ID,
    )
    model = build(config, AutoModelForMultimodalLM)
    return Family(model, [(AUDIO_ID, 5)], {"input_features": pixels(ROWS, 8, 40)})


FAMILIES: dict[str, Callable[[], Family]] = {
    "LLaVA": llava,
    "LLaVA-OneVision": llava_onevision,
    "Qwen2.5-VL": qwen2_5_vl,
    "Qwen3-VL": qwen3_vl,
    "SmolVLM": partial(smolvlm, "smolvlm"),
    "Idefics3": partial(smolvlm, "idefics3"),
    "InternVL": internvl,
    "Gemma 3": gemma3,
    "Gemma 4": gemma4,
    "PaliGemma": paligemma,
    "PaliGemma, prefix": paligemma_prefix,
    "Mistral 3": mistral3,
    "Pixtral": pixtral,
    "Phi-4-multimodal": phi4_multimodal,
    "Qwen2-Audio": qwen2_audio,
    "Voxtral": voxtral,
    "Qwen2.5-Omni (thinker)": qwen2_5_omni,
}
