"""Connectors, each with all that the rest asks of it: how many embeddings it makes of an item, and where they stand."""

from __future__ import annotations

from math import isqrt
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import initialization as init

if TYPE_CHECKING:
    from aki.models.configuration import AkiConfig, AkiConnectorConfig
    from aki.models.media import Media


class Connector(nn.Module):
    """(items, features, encoder width) -> (items, embeddings, language model width), an embedding a feature unless a
    connector says otherwise.

    Attributes:
        SIZES: its own fields of `AkiConnectorConfig` and their defaults, beside those that the class declares.

    Args:
        config: of the connector.
        vision_width, text_width: of what comes in and goes out.
    """

    SIZES: ClassVar[dict[str, Any]] = {}

    def __init__(self, config: AkiConnectorConfig, vision_width: int, text_width: int):
        super().__init__()

    @staticmethod
    def count(config: AkiConnectorConfig, features: int) -> int:
        """Embeddings, and so placeholders, of so many features: of a picture, a frame or an audio clip."""
        return features

    @staticmethod
    def grid(config: AkiConnectorConfig, patches: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns on which the embeddings of a picture stand, for rules with rings.

        Args:
            patches: rows and columns of the encoder's.

        Raises:
            ValueError: they stand on no grid.
        """
        return patches

    def initialise(self) -> None:
        """Set new parameters that are not those of a torch layer, with transformers' `init`."""


class LatentConnector(Connector):
    """Of `num_latents` embeddings, which stand on a square where they have to."""

    @staticmethod
    def count(config: AkiConnectorConfig, features: int) -> int:
        return config.num_latents

    @staticmethod
    def grid(config: AkiConnectorConfig, patches: tuple[int, int]) -> tuple[int, int]:
        return square(config.num_latents, "latents (connector_config.num_latents)")


class PerceiverAttention(nn.Module):
    """Latents attend to the features and to themselves (paper, section "The model"): features first on the key axis."""

    def __init__(self, width: int, num_heads: int, head_dim: int):
        super().__init__()
        inner = num_heads * head_dim
        self.num_heads = num_heads
        self.norm_media = nn.LayerNorm(width)
        self.norm_latents = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)

    def forward(self, features: Tensor, latents: Tensor) -> Tensor:
        query, keys, values = self._query_key_value(features, latents)
        attended = nn.functional.scaled_dot_product_attention(query, keys, values)
        return self.to_out(attended.transpose(1, 2).flatten(2))

    def weights(self, features: Tensor, latents: Tensor) -> Tensor:
        """What each latent pays to each feature and then to each latent: (items, latents, features + latents), the
        mean over the heads; rows sum to 1."""
        query, keys, _ = self._query_key_value(features, latents)
        scores = query @ keys.transpose(-1, -2) * query.shape[-1] ** -0.5
        return scores.softmax(-1).mean(1)

    def _query_key_value(self, features: Tensor, latents: Tensor) -> list[Tensor]:
        """Each (items, heads, tokens, head width)."""
        features, latents = self.norm_media(features), self.norm_latents(latents)
        keys, values = self.to_kv(torch.cat([features, latents], dim=1)).chunk(2, dim=-1)
        return [x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (self.to_q(latents), keys, values)]


def feed_forward(width: int, mult: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(width),
        nn.Linear(width, width * mult, bias=False),
        nn.GELU(),
        nn.Linear(width * mult, width, bias=False),
    )


class PerceiverResampler(LatentConnector):
    """The paper's connector: learned latents read the features through `depth` layers, then are projected."""

    def __init__(self, config: AkiConnectorConfig, vision_width: int, text_width: int):
        super().__init__(config, vision_width, text_width)
        self.latents = nn.Parameter(torch.randn(config.num_latents, vision_width))
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    PerceiverAttention(vision_width, config.num_heads, config.head_dim),
                    feed_forward(vision_width, config.ff_mult),
                ]
            )
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(vision_width)
        self.projection = nn.Linear(vision_width, text_width)

    def initialise(self) -> None:
        init.normal_(self.latents, mean=0.0, std=1.0)

    def forward(self, features: Tensor) -> Tensor:
        latents = self.latents.expand(features.shape[0], -1, -1)
        for layer in self.layers:
            attention, mlp = layer.children()
            latents = latents + attention(features, latents)
            latents = latents + mlp(latents)
        return self.projection(self.norm(latents))

    def feature_weights(self, features: Tensor) -> Tensor:
        """From which features each embedding is made: (items, latents, features), rows sum to 1.

        The mean over layers and heads of what the latents pay to the features; what they pay to each other is left out.
        """
        latents, paid = self.latents.expand(features.shape[0], -1, -1), []
        for layer in self.layers:
            attention, mlp = layer.children()
            assert isinstance(attention, PerceiverAttention)
            paid.append(attention.weights(features, latents)[..., : features.shape[1]])
            latents = latents + attention(features, latents)
            latents = latents + mlp(latents)
        mean = torch.stack(paid).mean(0)
        return mean / mean.sum(-1, keepdim=True)


class MLPConnector(Connector):
    """LLaVA's connector: two layers, one embedding a feature."""

    def __init__(self, config: AkiConnectorConfig, vision_width: int, text_width: int):
        super().__init__(config, vision_width, text_width)
        self.layers = nn.Sequential(nn.Linear(vision_width, text_width), nn.GELU(), nn.Linear(text_width, text_width))

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features)


class PooledMLPConnector(LatentConnector, MLPConnector):
    """The MLP on means of the features over a square of `num_latents` places, as Gemma 3's projector pools its patches.

    Each place has an embedding of its own added, because convolutional encoders give it no position.
    """

    def __init__(self, config: AkiConnectorConfig, vision_width: int, text_width: int):
        super().__init__(config, vision_width, text_width)
        self.places = self.grid(config, (0, 0))
        self.positions = nn.Parameter(torch.zeros(config.num_latents, text_width))

    def initialise(self) -> None:
        init.zeros_(self.positions)

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(self.means(features)) + self.positions

    def means(self, features: Tensor) -> Tensor:
        """(items, features, width) -> (items, places, width)"""
        map_ = features.transpose(1, 2).unflatten(2, square(features.shape[1], "patches"))
        return nn.functional.adaptive_avg_pool2d(map_, self.places).flatten(2).transpose(1, 2)

    def feature_weights(self, features: Tensor) -> Tensor:
        """(items, places, features), rows sum to 1: the share of each feature in each mean."""
        items, number, _ = features.shape
        return self.means(torch.eye(number, dtype=features.dtype, device=features.device).expand(items, -1, -1))


def square(number: int, name: str) -> tuple[int, int]:
    """Rows and columns of so many.

    Raises:
        ValueError: they are no square.
    """
    side = isqrt(number)
    if side * side != number:
        raise ValueError(
            f"the number of {name} has to be a square for pooled_mlp and for rules with rings, {number} is none: "
            f"{side * side} or {(side + 1) ** 2} would be."
        )
    return side, side


CONNECTORS: dict[str, type[Connector]] = {
    "perceiver_resampler": PerceiverResampler,
    "mlp": MLPConnector,
    "pooled_mlp": PooledMLPConnector,
}


def connector_named(name: str) -> type[Connector]:
    """
    Raises:
        ValueError: there is no such connector.
    """
    if name not in CONNECTORS:
        raise ValueError(
            f"there is no connector {name!r}; there are {', '.join(CONNECTORS)}. Your own comes with --plugin FILE."
        )
    return CONNECTORS[name]


def computation_dtype(module: nn.Module, default: torch.dtype) -> torch.dtype:
    """The dtype that a module computes in: that of its floating-point parameters; quantised ones are stored integers.

    Args:
        default: where all of them are quantised, which then compute in the dtype of what comes in.
    """
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), default)


def connector_of(media: Media, config: AkiConfig) -> Connector:
    """A new connector between one of the model's encoders and its language model."""
    kind = connector_named(media.connector_config.connector)
    return kind(media.connector_config, media.encoder_config.hidden_size, config.text_config.hidden_size)
