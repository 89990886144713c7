"""A folder for each family that vLLM is asked about: tiny random weights, a tokenizer and a processor, as saved by us.

vLLM's CPU kernel takes heads of 32 and more, hence the widths.
"""

from __future__ import annotations

import re
from collections.abc import Callable
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
    "what is in the picture? how many digits are red? is there a blue one? count them all. describe it, left and right. "
    "one two three yes no this that"
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


def tokenizer(media: list[str], template: str) -> PreTrainedTokenizerFast:
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
        additional_special_tokens=SPECIAL[4:] + media,
        padding_side="left",
        chat_template=template,
    )


def save(folder: Path, config: Any, processor: Any) -> Path:
    """Weights larger than an initialisation's, so that what a token sees changes what it says."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).float().eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "norm" not in name:
            parameter.data.normal_(0, 0.15)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)
    _as_on_the_hub(folder)
    processor.save_pretrained(folder)
    return folder


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


FAMILIES: dict[str, Callable[[Path], Path]] = {"LLaVA": llava}
