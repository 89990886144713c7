"""Families that take videos or audio, tiny and random as those of `families.py`; videos need torchvision."""

from __future__ import annotations

from typing import Any

from families import CHATML, SQUARE, TEXT, VISION, text_sizes, tokenizer_with
from transformers import AutoConfig, Qwen2AudioProcessor, WhisperFeatureExtractor
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from aki.models import AkiConfig, AkiProcessor
from aki.models.templates import CAPTION, SHORT

RATE = 800
"""Of the audio, in Hz."""


def template(**marks: str) -> str:
    """ChatML with the placeholder of each kind of part."""
    chain = "".join(f"{{% elif p.type == '{kind}' %}}{mark}" for kind, mark in marks.items())
    return CHATML.replace("{% if p.type == 'image' %}MARK", "{% if p.type == 'none' %}" + chain)


def smolvlm() -> tuple[Any, Any]:
    """A video is its frames, as pictures with their times."""
    from transformers import SmolVLMProcessor, SmolVLMVideoProcessor
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    marks = ("<fake_token_around_image>", "<image>", "<video>", "<end_of_utterance>", "<global-img>")
    tiles = tuple(f"<row_{r}_col_{c}>" for r in range(1, 5) for c in range(1, 5))
    tokenizer = tokenizer_with(*marks, *tiles)
    edges = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}
    images, videos = SmolVLMImageProcessorPil(**edges), SmolVLMVideoProcessor(**edges, do_sample_frames=False)
    # The marks of answers are those of the template that the processor takes for a video by itself.
    written = template(image="<image>", video="<video>").replace("<|im_end|>", "<end_of_utterance>")
    written = written.replace("<|im_start|>{{ m.role }}\n", "{{ m.role | capitalize }}: ")
    written = written.replace("<|im_start|>assistant\n", "Assistant:")
    processor = SmolVLMProcessor(images, tokenizer, videos, image_seq_len=4, chat_template=written)
    config = AutoConfig.for_model(
        "smolvlm",
        text_config=text_sizes(tokenizer, "llama"),
        vision_config={**VISION, "patch_size": 4},
        image_token_id=processor.image_token_id,
        scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    return config, processor


def qwen2_5_vl() -> tuple[Any, Any]:
    """Multimodal rotary positions, of which a video has three axes."""
    from transformers import Qwen2_5_VLProcessor, Qwen2VLVideoProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    media = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    tokenizer = tokenizer_with(*media)
    parts = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2}
    parts |= {"size": {"shortest_edge": 16 * 16, "longest_edge": 32 * 32}}
    images, videos = Qwen2VLImageProcessorPil(**parts), Qwen2VLVideoProcessor(**parts, do_sample_frames=False)
    image, video, start, end = media
    written = template(image=start + image + end, video=start + video + end)
    processor = Qwen2_5_VLProcessor(images, tokenizer, videos, chat_template=written)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    ids = tokenizer.convert_tokens_to_ids(list(media))
    config = AutoConfig.for_model(
        "qwen2_5_vl",
        text_config=text_sizes(tokenizer, "qwen2_5_vl_text", rope_parameters=rope),
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "patch_size": 4,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "out_hidden_size": TEXT["hidden_size"],
            "window_size": 8,
            "fullatt_block_indexes": [1],
        },
        image_token_id=ids[0],
        video_token_id=ids[1],
        vision_start_token_id=ids[2],
        vision_end_token_id=ids[3],
    )
    return config, processor


def internvl() -> tuple[Any, Any]:
    """Pictures in tiles; the frames of a video have placeholders of pictures."""
    from transformers import InternVLProcessor, InternVLVideoProcessor
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    named = {"context_image_token": "<IMG_CONTEXT>", "start_image_token": "<img>", "end_image_token": "</img>"}
    tokenizer = tokenizer_with(**named, video_token="<video>")
    images = GotOcr2ImageProcessorPil(size=SQUARE, crop_to_patches=True, min_patches=1, max_patches=2)
    videos = InternVLVideoProcessor(size=SQUARE, do_sample_frames=False)
    written = template(image="<IMG_CONTEXT>", video="<video>")
    processor = InternVLProcessor(images, tokenizer, videos, image_seq_length=4, chat_template=written)
    config = AutoConfig.for_model(
        "internvl",
        text_config=text_sizes(tokenizer, "qwen2"),
        vision_config={**VISION, "image_size": [16, 16], "patch_size": [4, 4]},
        image_token_id=processor.image_token_id,
        image_seq_length=4,
    )
    return config, processor


def llava_onevision() -> tuple[Any, Any]:
    """Tiles of a picture as LLaVA-NeXT's; a video's frames are pooled."""
    from transformers import LlavaOnevisionProcessor, LlavaOnevisionVideoProcessor
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

    tokenizer = tokenizer_with("<image>", "<video>")
    grid = [[16, 16], [16, 32]]
    images = LlavaOnevisionImageProcessorPil(size=SQUARE, image_grid_pinpoints=grid)
    videos = LlavaOnevisionVideoProcessor(size=SQUARE, do_sample_frames=False)
    written = template(image="<image>\n", video="<video>\n")
    processor = LlavaOnevisionProcessor(
        images, tokenizer, videos, num_image_tokens=4, vision_feature_select_strategy="full", chat_template=written
    )
    config = AutoConfig.for_model(
        "llava_onevision",
        text_config=text_sizes(tokenizer, "qwen2"),
        vision_config={"model_type": "siglip_vision_model", **VISION, "vision_use_head": False},
        image_token_index=processor.image_token_id,
        video_token_index=processor.video_token_id,
        image_grid_pinpoints=grid,
    )
    return config, processor


def qwen2_audio() -> tuple[Any, Any]:
    tokenizer = tokenizer_with("<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>")
    ears = WhisperFeatureExtractor(feature_size=8, sampling_rate=RATE, hop_length=10, chunk_length=1, n_fft=40)
    written = template(audio="<|audio_bos|><|AUDIO|><|audio_eos|>")
    processor = Qwen2AudioProcessor(ears, tokenizer, chat_template=written)
    config = AutoConfig.for_model(
        "qwen2_audio",
        text_config=text_sizes(tokenizer, "qwen2"),
        audio_config={
            "model_type": "qwen2_audio_encoder",
            "num_mel_bins": 8,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 24,
            "d_model": 16,
            "max_source_positions": 40,
        },
        audio_token_index=tokenizer.convert_tokens_to_ids("<|AUDIO|>"),
    )
    return config, processor


def aki() -> tuple[Any, Any]:
    """AKI's own, with an encoder for each of pictures, videos and audio."""
    tokenizer = tokenizer_with("<video>", "<audio>")
    ears = WhisperFeatureExtractor(feature_size=8, sampling_rate=RATE, hop_length=10, chunk_length=1, n_fft=40)
    connector = {"connector": "mlp"}
    whisper = {"num_mel_bins": 8, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 24}
    whisper |= {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 24}
    config = AkiConfig(
        vision_config=AutoConfig.for_model("siglip_vision_model", **VISION),
        text_config=text_sizes(tokenizer, "llama"),
        connector_config=connector,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        video_config=AutoConfig.for_model("siglip_vision_model", **VISION),
        video_connector_config=connector,
        video_frames=2,
        video_token_id=tokenizer.convert_tokens_to_ids("<video>"),
        audio_config=AutoConfig.for_model("whisper", d_model=16, max_source_positions=40, pad_token_id=0, **whisper),
        audio_connector_config=connector,
        audio_token_id=tokenizer.convert_tokens_to_ids("<audio>"),
    )
    processor = AkiProcessor(
        SiglipImageProcessorPil(size=SQUARE),
        tokenizer,
        config.image_seq_length,
        chat_template={"default": SHORT, "caption": CAPTION},
        video_seq_length=config.media["pixel_values_videos"].tokens_per_item,
        video_frames=config.video_frames,
        audio_seq_length=config.media["input_features"].tokens_per_item,
        audio_extractor=ears,
    )
    return config, processor


CLIP_FAMILIES = {one.__name__: one for one in (llava_onevision, smolvlm, qwen2_5_vl, internvl, qwen2_audio, aki)}
