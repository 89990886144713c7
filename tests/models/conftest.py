import json

import numpy as np
import pytest
from model_builders import PER_IMAGE, PIXELS, TEXT, tiny_model
from PIL import Image
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from aki import AkiForConditionalGeneration, AkiProcessor
from aki.data.tokenizer import train_tokenizer
from aki.models.templates import CAPTION, SHORT

TEXTS = ["what is this ?", "and this ?", "a red one", "be brief", "no", "yes it is", "one two\nthree"]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, vocab_size=320)


@pytest.fixture
def make_processor(tokenizer):
    """A processor; `flags` are set on the tokenizer's `<|assistant|>`, for instance rstrip=True as Phi-3 has it."""

    def make(chat_template=None, flags: dict | None = None, **kwargs) -> AkiProcessor:
        description = json.loads(tokenizer.backend_tokenizer.to_str())
        for token in description["added_tokens"]:
            if token["content"] == "<|assistant|>":
                token |= flags or {}
        own = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(json.dumps(description)),
            pad_token=tokenizer.pad_token,
            eos_token=tokenizer.eos_token,
            padding_side="left",
        )
        return AkiProcessor(
            SiglipImageProcessorPil(size={"height": PIXELS, "width": PIXELS}),
            own,
            image_seq_length=PER_IMAGE,
            chat_template=chat_template or {"default": SHORT, "caption": CAPTION},
            **kwargs,
        )

    return make


@pytest.fixture
def processor(make_processor) -> AkiProcessor:
    return make_processor()


@pytest.fixture
def make_model(processor):
    """A model for the processor's tokenizer."""

    def make(text: str = "llama", **config) -> AkiForConditionalGeneration:
        text_config = TEXT[text]()
        text_config.vocab_size = len(processor.tokenizer)
        text_config.eos_token_id = processor.tokenizer.eos_token_id
        text_config.pad_token_id = processor.tokenizer.pad_token_id
        return tiny_model(text_config=text_config, image_token_id=processor.image_token_id, **config)

    return make


@pytest.fixture
def picture():
    """A picture of one colour, as a function of how bright it is."""

    def make(level: int = 100) -> Image.Image:
        return Image.fromarray(np.full((20, 30, 3), level, np.uint8))

    return make
