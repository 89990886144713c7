"""A tiny LLaVA that reads, with a processor that has its vocabulary."""

import pytest
from transformers import AutoConfig, CLIPImageProcessorPil, LlavaProcessor
from unlock_chats import QUESTIONS
from unlock_families import TEXT, VISION, build

from aki.data.tokenizer import train_tokenizer
from aki.models.templates import SHORT


@pytest.fixture
def processor():
    tokenizer = train_tokenizer(QUESTIONS * 5, vocab_size=300)
    images = CLIPImageProcessorPil(size={"height": 16, "width": 16}, do_center_crop=False)
    options = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return LlavaProcessor(images, tokenizer, chat_template=SHORT, **options)


@pytest.fixture
def reader(processor):
    """A tiny LLaVA with the processor's vocabulary."""
    tokenizer = processor.tokenizer
    sizes = {"vocab_size": len(tokenizer)}
    sizes |= {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = AutoConfig.for_model(
        "llava",
        text_config={"model_type": "llama", **TEXT, **sizes},
        vision_config={"model_type": "clip_vision_model", **VISION},
        image_token_index=processor.image_token_id,
    )
    model = build(config)
    model.generation_config.suppress_tokens = [processor.image_token_id]
    return model
