"""A folder for each family that vLLM is asked about: tiny random weights, a tokenizer and a processor, as saved by us.

vLLM's CPU kernel takes heads of 32 and more, hence the widths.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    PreTrainedTokenizerFast,
)

TEXTS = (
    "what is in the picture? how many digits are red? is there a blue one? count them all. "
    "describe it, left and right. one two three yes no this that"
)
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<|user|>", "<|assistant|>", "<|end|>"]

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
CHAT = (
    "{%- for message in messages -%}<|{{ message.role }}|>"
    "{%- if message.content is string -%}{{ message.content }}"
    "{%- else -%}{%- for part in message.content -%}"
    "{%- if part.type == 'image' -%}IMAGE{%- else -%}{{ part.text }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}<|end|>{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)


def tokenizer(media: list[str], template: str, named: dict[str, str] | None = None) -> PreTrainedTokenizerFast:
    inner = Tokenizer(BPE())
    inner.pre_tokenizer = ByteLevel(add_prefix_space=False)
    inner.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(vocab_size=400, special_tokens=SPECIAL + media, initial_alphabet=ByteLevel.alphabet())
    inner.train_from_iterator([TEXTS] * 2, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=named or SPECIAL[4:] + media,
        padding_side="left",
        chat_template=template,
    )


def save(folder: Path, config: Any, processor: Any) -> Path:
    """Weights larger than an initialisation's, so that what a token sees changes what it says."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).float().eval()
    _make_random(model)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)
    _as_on_the_hub(folder)
    processor.save_pretrained(folder)
    return folder


def _make_random(model: torch.nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "norm" not in name:
            parameter.data.normal_(0, 0.15)


def _as_on_the_hub(folder: Path) -> None:
    """Newer transformers dropped a level of CLIP's and SigLIP's names; checkpoints on the hub, and vLLM, have it."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    level = re.compile(r"(vision_tower\.)(?=(embeddings|encoder|pre_layrnorm|post_layernorm)\.)")
    if AutoConfig.from_pretrained(folder).vision_config.model_type in ("clip_vision_model", "siglip_vision_model"):
        weights = {level.sub(r"\1vision_model.", name): value for name, value in weights.items()}
    save_file(weights, file, {"format": "pt"})


def llava(folder: Path) -> Path:
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_clip import CLIPImageProcessor

    words = tokenizer(["<image>"], CHAT.replace("IMAGE", "<image>"))
    image = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = LlavaProcessor(
        image, words, patch_size=8, vision_feature_select_strategy="default", chat_template=words.chat_template,
        image_token="<image>", num_additional_image_tokens=1,
    )  # fmt: skip
    config = AutoConfig.for_model(
        "llava",
        text_config={"model_type": "llama", "vocab_size": len(words), **TEXT},
        vision_config={"model_type": "clip_vision_model", **VISION},
        image_token_index=words.convert_tokens_to_ids("<image>"),
    )
    return save(folder, config, processor)


def qwen2_5_vl(folder: Path) -> Path:
    from transformers import Qwen2_5_VLProcessor
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    media = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    words = tokenizer(media, CHAT.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"))
    parts = {"patch_size": 8, "temporal_patch_size": 2, "merge_size": 2}
    image = Qwen2VLImageProcessor(**parts, min_pixels=32 * 32, max_pixels=48 * 48)
    video = Qwen2VLVideoProcessor(**parts, min_pixels=32 * 32, max_pixels=48 * 48)
    processor = Qwen2_5_VLProcessor(image, words, video, chat_template=words.chat_template)
    ids = words.convert_tokens_to_ids(media)
    config = AutoConfig.for_model(
        "qwen2_5_vl",
        text_config={
            **TEXT,
            "vocab_size": len(words),
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_heads": 2,
            "patch_size": 8,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "out_hidden_size": 64,
            "window_size": 32,
            "fullatt_block_indexes": [1],
        },
        image_token_id=ids[0],
        video_token_id=ids[1],
        vision_start_token_id=ids[2],
        vision_end_token_id=ids[3],
    )
    return save(folder, config, processor)


def idefics3(folder: Path) -> Path:
    from transformers import Idefics3Processor
    from transformers.models.idefics3.image_processing_idefics3 import Idefics3ImageProcessor

    rows = [f"<row_{i + 1}_col_{j + 1}>" for i in range(6) for j in range(6)]
    media = ["<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>", *rows]
    words = tokenizer(media, CHAT.replace("IMAGE", "<image>"))
    image = Idefics3ImageProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    processor = Idefics3Processor(image, words, image_seq_len=4, chat_template=words.chat_template)
    config = AutoConfig.for_model(
        "idefics3",
        text_config={"model_type": "llama", "vocab_size": len(words), **TEXT},
        vision_config=VISION,
        image_token_id=words.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=0,
    )
    return save(folder, config, processor)


def internvl(folder: Path) -> Path:
    from transformers import InternVLProcessor
    from transformers.models.got_ocr2.image_processing_got_ocr2 import GotOcr2ImageProcessor
    from transformers.models.internvl.video_processing_internvl import InternVLVideoProcessor

    media = ["<IMG_CONTEXT>", "<img>", "</img>", "<video>"]
    named = dict(
        zip(("context_image_token", "start_image_token", "end_image_token", "video_token"), media, strict=True)
    )
    words = tokenizer(media, CHAT.replace("IMAGE", "<IMG_CONTEXT>"), named)
    image = GotOcr2ImageProcessor(size={"height": 32, "width": 32}, crop_to_patches=True, min_patches=1, max_patches=2)
    video = InternVLVideoProcessor(size={"height": 32, "width": 32})
    processor = InternVLProcessor(image, words, video, image_seq_length=4, chat_template=words.chat_template)
    config = AutoConfig.for_model(
        "internvl",
        text_config={"model_type": "qwen2", "vocab_size": len(words), **TEXT},
        vision_config={**VISION, "image_size": [32, 32], "patch_size": [8, 8]},
        image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
    )
    return save(folder, config, processor)


def gemma3(folder: Path) -> Path:
    from transformers import Gemma3Processor
    from transformers.models.gemma3.image_processing_gemma3 import Gemma3ImageProcessor

    # vLLM looks for runs of line breaks as tokens, which Gemma's tokenizer has.
    media = ["<image_soft_token>", "<start_of_image>", "<end_of_image>", "\n", "\n\n", "\n\n\n", "\n\n\n\n"]
    named = dict(zip(("image_token", "boi_token", "eoi_token"), media, strict=False))
    words = tokenizer(media, CHAT.replace("IMAGE", "<start_of_image>"), named)
    image = Gemma3ImageProcessor(size={"height": 32, "width": 32})
    processor = Gemma3Processor(image, words, image_seq_length=4, chat_template=words.chat_template)
    ids = words.convert_tokens_to_ids(media)
    config = AutoConfig.for_model(
        "gemma3",
        text_config={
            **TEXT,
            "vocab_size": len(words),
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        vision_config={"model_type": "siglip_vision_model", **VISION, "vision_use_head": False},
        image_token_index=ids[0],
        boi_token_index=ids[1],
        eoi_token_index=ids[2],
        mm_tokens_per_image=4,
    )
    return save(folder, config, processor)


def mistral3(folder: Path) -> Path:
    from transformers import PixtralProcessor
    from transformers.models.pixtral.image_processing_pixtral import PixtralImageProcessor

    media = ["[IMG]", "[IMG_BREAK]", "[IMG_END]"]
    words = tokenizer(media, CHAT.replace("IMAGE", "[IMG]"))
    image = PixtralImageProcessor(size={"longest_edge": 32}, patch_size={"height": 8, "width": 8})
    processor = PixtralProcessor(image, words, patch_size=8, spatial_merge_size=2, chat_template=words.chat_template)
    config = AutoConfig.for_model(
        "mistral3",
        text_config={"model_type": "mistral", **TEXT, "vocab_size": len(words), "sliding_window": None},
        vision_config={"model_type": "pixtral", **VISION, "head_dim": 32},
        image_token_index=words.convert_tokens_to_ids("[IMG]"),
        spatial_merge_size=2,
        vision_feature_layer=-1,
    )
    return save(folder, config, processor)


def omni_parts(words: PreTrainedTokenizerFast) -> tuple[dict[str, Any], dict[str, Any]]:
    """Videos of three frames, and audio, for AKI's configuration and for its processor."""
    from transformers import WhisperConfig, WhisperFeatureExtractor
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    words.add_tokens(["<video>", "<audio>"], special_tokens=True)
    sizes = {"num_latents": 4, "depth": 1, "num_heads": 2, "head_dim": 16}
    whisper = WhisperConfig(
        d_model=32, encoder_layers=1, encoder_attention_heads=2, decoder_layers=1, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, num_mel_bins=8, max_source_positions=50, vocab_size=10, pad_token_id=0,
    )  # fmt: skip
    config = {
        "video_config": AutoConfig.for_model("siglip_vision_model", **VISION),
        "video_connector_config": sizes,
        "video_frames": 3,
        "video_token_id": words.convert_tokens_to_ids("<video>"),
        "audio_config": whisper,
        "audio_connector_config": sizes,
        "audio_token_id": words.convert_tokens_to_ids("<audio>"),
    }
    extractor = WhisperFeatureExtractor(feature_size=8, sampling_rate=8000, hop_length=80, chunk_length=1, n_fft=100)
    processor = {
        "video_seq_length": 12,
        "video_frames": 3,
        "frame_processor": SiglipImageProcessorPil(size={"height": 32, "width": 32}),
        "audio_seq_length": 4,
        "audio_extractor": extractor,
    }
    return config, processor


def aki_folder(folder: Path, connector: str = "perceiver_resampler", omni: bool = False) -> Path:
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    from aki import AkiConfig, AkiForConditionalGeneration, AkiProcessor
    from aki.data.tokenizer import train_tokenizer
    from aki.models.templates import CAPTION, SHORT

    words = train_tokenizer([TEXTS] * 2, vocab_size=340)
    clips = omni_parts(words) if omni else ({}, {})
    config = AkiConfig(
        vision_config=AutoConfig.for_model("siglip_vision_model", **VISION),
        text_config=AutoConfig.for_model("llama", **TEXT, vocab_size=len(words)),
        connector_config={"connector": connector, "num_latents": 6, "depth": 1, "num_heads": 2, "head_dim": 16},
        image_token_id=words.convert_tokens_to_ids("<image>"),
        **clips[0],
    )
    processor = AkiProcessor(
        SiglipImageProcessorPil(size={"height": 32, "width": 32}),
        words,
        image_seq_length=config.image_seq_length,
        chat_template={"default": SHORT, "caption": CAPTION},
        **clips[1],
    )
    torch.manual_seed(0)
    model = AkiForConditionalGeneration(config).float().eval()
    _make_random(model)
    model.generation_config.eos_token_id = None
    model.generation_config.suppress_tokens = None
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


FAMILIES: dict[str, Callable[[Path], Path]] = {
    "LLaVA": llava,
    "Qwen2.5-VL": qwen2_5_vl,
    "Idefics3": idefics3,
    "InternVL": internvl,
    "Gemma 3": gemma3,
    "Mistral 3": mistral3,
    "AKI": aki_folder,
    "AKI, MLP": partial(aki_folder, connector="mlp"),
}
