"""Folders of tiny random models of several families, with processors and chat templates as theirs are published."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForMultimodalLM,
    AutoProcessor,
    CLIPImageProcessorPil,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    PaddleOCRVLImageProcessorPil,
    PaddleOCRVLProcessor,
    PreTrainedTokenizerFast,
)

from aki.data.tokenizer import train_tokenizer

WORDS = ["is it red or blue?", "what colour is it?", "and now?", "it is green", "how many are there? one two three"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for p in m.content %}{% if p.type == 'image' %}MARK"
    "{% else %}{{ p.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
SQUARE = {"height": 16, "width": 16}


def tokenizer_with(*tokens: str, **named: str) -> PreTrainedTokenizerFast:
    """
    Args:
        tokens: special ones.
        named: attribute of the tokenizer -> a special token.
    """
    trained = train_tokenizer(WORDS * 5, vocab_size=400)
    trained.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", *tokens, *named.values()]})
    if not named:
        return trained
    return PreTrainedTokenizerFast(
        tokenizer_object=trained.backend_tokenizer,
        pad_token=trained.pad_token,
        eos_token=trained.eos_token,
        additional_special_tokens=list(tokens),
        extra_special_tokens=named,
    )


def text_sizes(tokenizer: Any, kind: str, **more: Any) -> dict[str, Any]:
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    return {"model_type": kind, **TEXT, "vocab_size": len(tokenizer), **ids, **more}


def template(mark: str) -> str:
    return CHATML.replace("MARK", mark)


def llava() -> tuple[Any, Any]:
    tokenizer = tokenizer_with("<image>")
    images = CLIPImageProcessorPil(size=SQUARE, do_center_crop=False)
    options = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    processor = LlavaProcessor(images, tokenizer, chat_template=template("<image>\n"), **options)
    config = AutoConfig.for_model(
        "llava",
        text_config=text_sizes(tokenizer, "llama", hidden_size=64, intermediate_size=64),
        vision_config={"model_type": "clip_vision_model", **VISION},
        image_token_index=processor.image_token_id,
    )
    return config, processor


def idefics3() -> tuple[Any, Any]:
    """SmolVLM's own family of layers; pictures are cut into tiles."""
    marks = ("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>")
    tiles = tuple(f"<row_{r}_col_{c}>" for r in range(1, 5) for c in range(1, 5))
    tokenizer = tokenizer_with(*marks, *tiles)
    images = Idefics3ImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    processor = Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=template("<image>"))
    config = AutoConfig.for_model(
        "idefics3",
        text_config=text_sizes(tokenizer, "llama"),
        vision_config={**VISION, "patch_size": 4},
        image_token_id=processor.image_token_id,
        scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    return config, processor


def gemma3() -> tuple[Any, Any]:
    """Layers with a window, and a mask of its own in which a picture's tokens see each other."""
    tokenizer = tokenizer_with(boi_token="<start_of_image>", eoi_token="<end_of_image>", image_token="<image_soft>")
    images = Gemma3ImageProcessorPil(size=SQUARE)
    processor = Gemma3Processor(images, tokenizer, image_seq_length=4, chat_template=template("<start_of_image>"))
    layers = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 8}
    config = AutoConfig.for_model(
        "gemma3",
        text_config=text_sizes(tokenizer, "gemma3_text", **layers),
        vision_config={"model_type": "siglip_vision_model", **VISION, "patch_size": 4, "vision_use_head": False},
        image_token_index=tokenizer.image_token_id,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        mm_tokens_per_image=4,
    )
    return config, processor


def llava_next() -> tuple[Any, Any]:
    """As many tiles as a picture's form asks for."""
    tokenizer = tokenizer_with("<image>")
    grid = [[16, 32], [32, 16]]
    images = LlavaNextImageProcessorPil(size={"shortest_edge": 16}, crop_size=SQUARE, image_grid_pinpoints=grid)
    options = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    processor = LlavaNextProcessor(images, tokenizer, chat_template=template("<image>\n"), **options)
    config = AutoConfig.for_model(
        "llava_next",
        text_config=text_sizes(tokenizer, "mistral", head_dim=8, sliding_window=None),
        vision_config={"model_type": "clip_vision_model", **VISION},
        image_token_index=processor.image_token_id,
        image_grid_pinpoints=grid,
    )
    return config, processor


def paddleocr_vl() -> tuple[Any, Any]:
    """Multimodal rotary positions, and pictures at their own resolution."""
    begin, end = "<|IMAGE_START|>", "<|IMAGE_END|>"
    tokenizer = tokenizer_with(begin, end, image_token="<|IMAGE_PLACEHOLDER|>")
    images = PaddleOCRVLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=1, size={"shortest_edge": 64, "longest_edge": 1024}
    )
    mark = f"{begin}<|IMAGE_PLACEHOLDER|>{end}"
    processor = PaddleOCRVLProcessor(images, tokenizer, chat_template=template(mark))
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    config = AutoConfig.for_model(
        "paddleocr_vl",
        text_config=text_sizes(tokenizer, "paddleocr_vl_text", head_dim=8, rope_parameters=rope),
        vision_config={**VISION, "patch_size": 4, "spatial_merge_size": 2},
        image_token_id=tokenizer.image_token_id,
        vision_start_token_id=tokenizer.convert_tokens_to_ids(begin),
        vision_end_token_id=tokenizer.convert_tokens_to_ids(end),
    )
    return config, processor


FAMILIES = {one.__name__: one for one in (llava, idefics3, gemma3, llava_next, paddleocr_vl)}


def write_model(family: str, folder: Path, build: Callable[[], tuple[Any, Any]] | None = None) -> Path:
    """A random model of a family in a folder, as it would be published: no rule in it.

    Args:
        build: makes its configuration and processor; that of `FAMILIES` if absent.
    """
    try:
        config, processor = (build or FAMILIES[family])()
        processor.save_pretrained(folder)
        AutoProcessor.from_pretrained(folder)
    except ImportError as error:
        if not any(name in str(error) for name in ("Torchvision", "num2words")):
            raise
        pytest.skip(f"transformers {transformers.__version__} prepares media of {family} with packages that lack here")
    torch.manual_seed(0)
    model = AutoModelForMultimodalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.1)
    model.save_pretrained(folder)
    return folder
