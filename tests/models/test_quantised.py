"""Issue 12, entry 13: quantised weights are stored as integers, and that is not what a part computes in."""

import pytest
import torch
from model_builders import PER_IMAGE, assert_same, pictures, tiny_model, tokens
from torch import nn
from transformers import BitsAndBytesConfig, LlamaConfig, SiglipVisionConfig

from aki import AkiForConditionalGeneration

WIDTH = 64
SIZES = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2}
"""bitsandbytes quantises 64 weights at a time."""


class Int8Linear(nn.Module):
    """A layer whose first parameter is int8; the scale and the bias say what it computes in."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        scale = linear.weight.detach().abs().max() / 127
        self.weight = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.scale, self.bias = nn.Parameter(scale), linear.bias

    def forward(self, values):
        assert values.is_floating_point(), "features were cast to the dtype that the weights are stored in"
        return nn.functional.linear(values, self.weight * self.scale, self.bias)


def inputs(connector: str):
    per_image = PER_IMAGE if connector == "perceiver_resampler" else 4
    ids = torch.tensor([tokens("image", 7, 8, 9, per_image=per_image)])
    return {"input_ids": ids, "pixel_values": pictures(1)}


def test_12_13_a_connector_of_integers_gets_features_in_floating_point():
    model = tiny_model(connector="mlp")
    for number in (0, 2):
        model.model.connector.layers[number] = Int8Linear(model.model.connector.layers[number])
    restored = tiny_model(connector="mlp")
    for number in (0, 2):
        quantised = model.model.connector.layers[number]
        restored.model.connector.layers[number].weight.data = quantised.weight * quantised.scale.detach()
    with torch.no_grad():
        assert_same(model(**inputs("mlp")).logits, restored(**inputs("mlp")).logits)


@pytest.mark.parametrize("connector", ["mlp", "perceiver_resampler"])
@pytest.mark.parametrize("bits", [4, 8])
def test_12_13_bitsandbytes(tmp_path, connector, bits):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed; it runs on the CPU too")
    vision = SiglipVisionConfig(image_size=16, patch_size=8, **SIZES)
    sizes = {"connector": connector, "num_latents": PER_IMAGE, "depth": 1, "num_heads": 2, "head_dim": WIDTH}
    model = tiny_model(text_config=LlamaConfig(vocab_size=64, **SIZES))
    model = AkiForConditionalGeneration(
        type(model.config)(
            vision_config=vision, text_config=model.config.text_config, connector_config=sizes, image_token_id=2
        )
    ).eval()
    model.save_pretrained(tmp_path / "whole")
    how = BitsAndBytesConfig(**{f"load_in_{bits}bit": True, "llm_int8_skip_modules": ["lm_head"]})
    quantised = AkiForConditionalGeneration.from_pretrained(tmp_path / "whole", quantization_config=how)
    stored = {parameter.dtype for parameter in quantised.model.connector.parameters()}
    assert stored & {torch.int8, torch.uint8}
    with torch.no_grad():
        exact, found = (one(**inputs(connector)).logits for one in (model, quantised))
    assert (found - exact).abs().mean() < 0.2 * exact.abs().mean()
    quantised.save_pretrained(tmp_path / "quantised")
    again = AkiForConditionalGeneration.from_pretrained(tmp_path / "quantised")
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs(connector)).logits, found, atol=0.02, rtol=0.02)
