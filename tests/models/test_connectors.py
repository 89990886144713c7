"""The connectors against their formulas, written out one head and one image at a time (paper, section 2)."""

import math
from typing import ClassVar

import pytest
import torch
from model_builders import enlarge, tiny_model
from torch import Tensor, nn
from transformers import initialization as init

from aki import AkiConnectorConfig
from aki.models.connectors import CONNECTORS, Connector, MLPConnector, PerceiverResampler, PooledMLPConnector
from aki.training.model import model_config
from aki.training.recipe import ModelRecipe, RecipeError

VISION_WIDTH, TEXT_WIDTH, PATCHES = 12, 20, 7
SIZES = AkiConnectorConfig(num_latents=5, depth=3, num_heads=2, head_dim=4, ff_mult=3)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-5) * weight + bias


def gelu(x: Tensor) -> Tensor:
    """The exact one, by the normal distribution."""
    return x * 0.5 * (1 + torch.special.erf(x / math.sqrt(2)))


def resample(features: Tensor, w: dict[str, Tensor]) -> Tensor:
    """One image's features (patches, width) to (latents, text width)."""
    latents = w["latents"]
    for layer in range(SIZES.depth):

        def norm(x: Tensor, name: str, layer: int = layer) -> Tensor:
            return layer_norm(x, w[f"layers.{layer}.{name}.weight"], w[f"layers.{layer}.{name}.bias"])

        x, z = norm(features, "0.norm_media"), norm(latents, "0.norm_latents")
        both = torch.cat([x, z])
        q = torch.einsum("nd,ed->ne", z, w[f"layers.{layer}.0.to_q.weight"])
        kv = torch.einsum("nd,ed->ne", both, w[f"layers.{layer}.0.to_kv.weight"])
        inner = SIZES.num_heads * SIZES.head_dim
        k, v = kv[:, :inner], kv[:, inner:]
        heads = []
        for head in range(SIZES.num_heads):
            part = slice(head * SIZES.head_dim, (head + 1) * SIZES.head_dim)
            scores = torch.einsum("qd,kd->qk", q[:, part] * SIZES.head_dim**-0.5, k[:, part])
            weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
            heads.append(torch.einsum("qk,kd->qd", weights, v[:, part]))
        latents = latents + torch.einsum("ne,de->nd", torch.cat(heads, -1), w[f"layers.{layer}.0.to_out.weight"])
        hidden = gelu(torch.einsum("nd,ed->ne", norm(latents, "1.0"), w[f"layers.{layer}.1.1.weight"]))
        latents = latents + torch.einsum("ne,de->nd", hidden, w[f"layers.{layer}.1.3.weight"])
    out = layer_norm(latents, w["norm.weight"], w["norm.bias"])
    return torch.einsum("nd,ed->ne", out, w["projection.weight"]) + w["projection.bias"]


def test_the_resampler_is_the_papers():
    torch.manual_seed(0)
    connector = PerceiverResampler(SIZES, VISION_WIDTH, TEXT_WIDTH).double()
    enlarge(connector)
    features = torch.randn(3, PATCHES, VISION_WIDTH, dtype=torch.float64)
    out = connector(features)
    assert out.shape == (3, SIZES.num_latents, TEXT_WIDTH)
    wanted = torch.stack([resample(image, dict(connector.named_parameters())) for image in features])
    torch.testing.assert_close(out, wanted, atol=1e-12, rtol=1e-10)


def test_the_resampler_has_the_papers_weights():
    """Six layers, eight heads of 64, 144 latents at the encoder's width, biases in norms and the projection alone."""
    width, text_width = 24, 32
    connector = PerceiverResampler(AkiConnectorConfig(), width, text_width)
    layer = 4 * width + 8 * 64 * 4 * width + 2 * width + 2 * 4 * width * width
    total = 144 * width + 6 * layer + 2 * width + width * text_width + text_width
    assert sum(parameter.numel() for parameter in connector.parameters()) == total
    biases = {name for name, _ in connector.named_parameters() if name.endswith("bias") and "norm" not in name}
    assert biases == {"projection.bias"} | {f"layers.{n}.1.0.bias" for n in range(6)}


def test_the_mlp_is_llavas():
    torch.manual_seed(0)
    connector = MLPConnector(SIZES, VISION_WIDTH, TEXT_WIDTH).double()
    enlarge(connector)
    w = dict(connector.named_parameters())
    features = torch.randn(3, PATCHES, VISION_WIDTH, dtype=torch.float64)
    hidden = gelu(torch.einsum("bnd,ed->bne", features, w["layers.0.weight"]) + w["layers.0.bias"])
    wanted = torch.einsum("bnd,ed->bne", hidden, w["layers.2.weight"]) + w["layers.2.bias"]
    torch.testing.assert_close(connector(features), wanted, atol=1e-12, rtol=1e-10)


def test_the_pooled_mlp_is_llavas_on_means_over_places():
    """Six rows and columns of patches to four of places: a place is where its patches touch it."""
    torch.manual_seed(0)
    connector = PooledMLPConnector(AkiConnectorConfig(num_latents=16), VISION_WIDTH, TEXT_WIDTH).double()
    assert not connector.positions.any()
    enlarge(connector)
    features = torch.randn(2, 36, VISION_WIDTH, dtype=torch.float64)
    touched = [(0, 2), (1, 3), (3, 5), (4, 6)]
    means = [
        torch.stack([features[:, 6 * r + c] for r in range(*rows) for c in range(*columns)]).mean(0)
        for rows in touched
        for columns in touched
    ]
    wanted = connector.layers(torch.stack(means, 1)) + connector.positions
    torch.testing.assert_close(connector(features), wanted)
    weights = connector.feature_weights(features)
    torch.testing.assert_close(weights @ features, torch.stack(means, 1))
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 16, dtype=torch.float64))


def test_the_pooled_mlp_wants_squares():
    with pytest.raises(ValueError, match=r"num_latents\) has to be a square .*, 5 is none: 4 or 9"):
        PooledMLPConnector(SIZES, VISION_WIDTH, TEXT_WIDTH)
    connector = PooledMLPConnector(AkiConnectorConfig(num_latents=4), VISION_WIDTH, TEXT_WIDTH)
    with pytest.raises(ValueError, match="patches has to be a square"):
        connector(torch.randn(1, PATCHES, VISION_WIDTH))


@pytest.mark.parametrize("connector", [PerceiverResampler, MLPConnector])
def test_images_do_not_see_each_other(connector):
    torch.manual_seed(0)
    connector = connector(SIZES, VISION_WIDTH, TEXT_WIDTH)
    features = torch.randn(3, PATCHES, VISION_WIDTH)
    alone = torch.cat([connector(image[None]) for image in features])
    torch.testing.assert_close(connector(features), alone)


def test_an_unknown_connector_is_refused():
    with pytest.raises(ValueError, match=r"no connector 'mpl'; there are perceiver_resampler, mlp"):
        tiny_model(connector="mpl")


class Pooled(Connector):
    """The mean of each stride of features, with a parameter and a size of its own."""

    SIZES: ClassVar = {"stride": 2}

    def __init__(self, config: AkiConnectorConfig, vision_width: int, text_width: int):
        super().__init__(config, vision_width, text_width)
        self.stride = config.stride
        self.shift = nn.Parameter(torch.full((vision_width,), torch.nan))
        self.out = nn.Linear(vision_width, text_width)

    @staticmethod
    def count(config: AkiConnectorConfig, features: int) -> int:
        return features // config.stride

    @staticmethod
    def grid(config: AkiConnectorConfig, patches: tuple[int, int]) -> tuple[int, int]:
        return patches[0], patches[1] // config.stride

    def initialise(self) -> None:
        init.zeros_(self.shift)

    def forward(self, features: Tensor) -> Tensor:
        return self.out(features.unflatten(1, (-1, self.stride)).mean(2) + self.shift)


def test_a_connector_of_ones_own_is_one_class(monkeypatch, tmp_path):
    """Its size, its number of tokens, its grid and its first values: nothing else has to know of it."""
    monkeypatch.setitem(CONNECTORS, "pooled", Pooled)
    model = tiny_model(connector="pooled", attention_rule="concentric").eval()
    patches = model.config.num_patches
    assert (model.config.image_seq_length, patches) == (2, 4)
    assert model.config.media["pixel_values"].grid == (2, 1)
    assert not model.model.connector.shift.isnan().any()
    ids = torch.tensor([[5, *[model.config.image_token_id] * 2, 6, 7]])
    pictures = torch.randn(1, 3, *model.config.image_size)
    logits = model(input_ids=ids, pixel_values=pictures).logits
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert again.config.connector_config.stride == 2
    torch.testing.assert_close(again(input_ids=ids, pixel_values=pictures).logits, logits)
    assert AkiConnectorConfig(connector="pooled", stride=4).stride == 4
    parts = {"model_type": "siglip_vision_model"}, {"model_type": "llama"}
    recipe = ModelRecipe(*parts, {"connector": "pooled", "strides": 2})
    with pytest.raises(RecipeError, match=r"unknown key 'strides' in model\.connector\. Did you mean 'stride'"):
        model_config(recipe)
