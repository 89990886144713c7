"""What cannot be unlocked, and that it says why."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM
from unlock_families import IMAGE_ID, TEXT, VISION

import aki
from aki.attention import CannotUnlock


def tiny_mllama():
    config = AutoConfig.for_model(
        "mllama",
        text_config={
            **TEXT,
            "cross_attention_layers": [1],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_global_layers": 1,
            "attention_heads": 2,
            "image_size": 16,
            "patch_size": 8,
            "vision_output_dim": 32,
            "intermediate_layers_indices": [0],
        },
        image_token_index=IMAGE_ID,
    )
    return AutoModelForImageTextToText.from_config(config)


def tiny_llama():
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **TEXT))


def tiny_t5():
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 40}
    return AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", **sizes))


def tiny_idefics():
    parts = {"vision_config": {**VISION, "embed_dim": 16}, "perceiver_config": {"use_resampler": False}}
    config = AutoConfig.for_model("idefics", **TEXT, **parts, cross_layer_interval=1)
    return AutoModelForImageTextToText.from_config(config)


def tiny_lfm2():
    """Its convolutions carry what came before from token to token."""
    config = AutoConfig.for_model(
        "lfm2_vl",
        text_config={"model_type": "lfm2", **TEXT, "layer_types": ["conv", "full_attention"]},
        vision_config={"model_type": "siglip2_vision_model", **VISION},
        image_token_id=IMAGE_ID,
    )
    return AutoModelForImageTextToText.from_config(config)


def tiny_aki():
    parts = {"vision_config": {"model_type": "siglip_vision_model", **VISION}, "connector_config": {"connector": "mlp"}}
    config = aki.AkiConfig(**parts, text_config={"model_type": "llama", **TEXT}, image_token_id=IMAGE_ID)
    return aki.AkiForConditionalGeneration(config)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (tiny_idefics, "'idefics' reads images by cross-attention"),
        (tiny_lfm2, "layers of kind conv, which have no mask over pairs of tokens"),
        (tiny_aki, "AKI has its rule in its configuration: set model.config.attention_rule"),
        (tiny_mllama, "cross-attention: no image token stands in the decoder's sequence"),
        (tiny_llama, "no media tokens among its text"),
        (tiny_t5, "an encoder-decoder"),
        (lambda: torch.nn.Linear(2, 2), "no model of transformers"),
    ],
)
def test_what_cannot_be_unlocked_says_why(make, why):
    with pytest.raises(CannotUnlock, match=why):
        aki.unlock(make())


def test_a_rule_in_the_processors_place():
    with pytest.raises(ValueError, match=r"aki\.unlock\(model, rule='mma'\)"):
        aki.unlock(tiny_llama(), "mma")
