"""From pictures, videos and audio to embeddings of the language model: encoders, and the connectors behind them."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling
from transformers.utils.generic import can_return_tuple

from aki.layout import IMAGE, VIDEO, SequenceLayout
from aki.models.checks import check_count, check_size, check_takes_one_input
from aki.models.configuration import AkiConfig
from aki.models.connectors import computation_dtype
from aki.models.media import Media

NEVER_USED = {
    "siglip_vision_model": ("head",),
    "clip_vision_model": ("post_layernorm",),
    "dinov2": ("embeddings.mask_token",),
    "dinov2_with_registers": ("embeddings.mask_token",),
}
"""Parts of encoders, by model_type, that make none of their features: they stay as they are, and are not trained."""


class AkiEncodingMixin:
    """For the backbone and for what stands on it: `base_model`, the backbone, holds encoders and connectors.

    Each method gives `last_hidden_state`, the encoder's features (pictures, tokens, its width; of videos one row a
    frame), and `pooler_output`, the embeddings (items, embeddings an item, text width).
    """

    config: AkiConfig
    base_model: Any

    @can_return_tuple
    def get_image_features(self, pixel_values: Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """Features and embeddings of images.

        Args:
            pixel_values: (images, channels, height, width).
            kwargs: of the encoder, as `output_hidden_states`; and `return_dict`.

        Raises:
            ValueError: the images are not of the encoder's size.
        """
        return encode_media(self.base_model, "pixel_values", pixel_values, **kwargs)

    @can_return_tuple
    def get_video_features(self, pixel_values_videos: Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """As `get_image_features`, of videos: (videos, config.video_frames, channels, height, width)."""
        return encode_media(self.base_model, "pixel_values_videos", pixel_values_videos, **kwargs)

    @can_return_tuple
    def get_audio_features(self, input_features: Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """As `get_image_features`, of audio clips: (clips, mel bins, time)."""
        return encode_media(self.base_model, "input_features", input_features, **kwargs)

    def patch_features(self, pixel_values: Tensor) -> Tensor:
        """The vision encoder's features of images, (images, patches, width)."""
        media = self.config.media["pixel_values"]
        return patches_of(media, run_encoder(self.base_model, media, pixel_values))


def encoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, or its encoder where a decoder comes with it, as Whisper's.

    Raises:
        ValueError: it wants more than one input.
    """
    encoder = model.get_encoder() if model.config.is_encoder_decoder else model
    check_takes_one_input(encoder)
    for name in NEVER_USED.get(encoder.config.model_type, ()):
        part: Any = encoder
        for attribute in name.split("."):
            part = getattr(part, attribute, None)
        if part is not None:
            part.requires_grad_(False)
    return encoder


def encode_media(backbone: Any, name: str, values: Tensor, **kwargs) -> BaseModelOutputWithPooling:
    """Features and embeddings of one kind of media, by the name of its input."""
    if name not in backbone.config.media:
        raise ValueError(
            f"this model has no encoder for {name}: give its AkiConfig a video_config or an audio_config, "
            "with a placeholder."
        )
    media = backbone.config.media[name]
    check_size(name, media, values)
    if name == "pixel_values" and backbone.feature_cache is not None:
        patches = backbone.feature_cache(values, backbone.patch_features)
        encoded = BaseModelOutput(last_hidden_state=patches)
    else:
        encoded = run_encoder(backbone, media, values.flatten(0, 1) if media.modality == VIDEO else values, **kwargs)
        patches = patches_of(media, encoded)
    connector = backbone.get_submodule(media.connector)
    embeds = connector(patches.to(computation_dtype(connector, patches.dtype)))
    return BaseModelOutputWithPooling(
        last_hidden_state=encoded.last_hidden_state,
        pooler_output=embeds.unflatten(0, (-1, media.frames)).flatten(1, 2),
        hidden_states=encoded.get("hidden_states"),
        attentions=encoded.get("attentions"),  # a convolutional encoder has none
    )


def patches_of(media: Media, encoded: BaseModelOutput) -> Tensor:
    """(pictures, tokens, width). Class and register tokens come before the patches; a convolutional network's features
    are a map (pictures, width, rows, columns)."""
    features = encoded.last_hidden_state
    if features.ndim == 4:
        features = features.flatten(2).transpose(1, 2)
    return features[:, -media.num_features :]


def run_encoder(backbone: Any, media: Media, values: Tensor, **kwargs) -> BaseModelOutput:
    """An encoder's output; a frozen encoder runs without gradient."""
    encoder: Any = backbone.get_submodule(media.encoder)
    learns = any(parameter.requires_grad for parameter in encoder.parameters())
    # It was settled on pictures; where it is, an autocast around the model changes nothing.
    lower = backbone.encoder_dtype if media.modality == IMAGE else None
    precision = (
        nullcontext() if lower is None else torch.autocast(values.device.type, lower, enabled=lower != encoder.dtype)
    )
    with torch.set_grad_enabled(torch.is_grad_enabled() and learns), precision:
        return encoder(values.to(encoder.dtype), return_dict=True, **kwargs)


def put_media(
    backbone: Any,
    ids: Tensor,
    inputs_embeds: Tensor,
    embeds: dict[str, Tensor],
    given: set[str],
    counted: bool,
    layout: SequenceLayout | None,
) -> Tensor:
    """The embeddings of items in place of their placeholders' own; what is not given stays in the graph, at none.

    Args:
        backbone: the model with encoders and connectors.
        ids: (batch, length), with the placeholders.
        embeds: name of the input -> (items, embeddings an item, text width).
        given: the inputs that were passed; others are blanks.
        counted: whether a placeholder without its item is an error.
        layout: of the tokens, where it is known.

    Returns:
        (batch, length, text width).

    Raises:
        ValueError: more or fewer placeholders than embeddings.
    """
    for name, media in backbone.config.media.items():
        placeholders = ids == media.token_id
        count = (placeholders if layout is None else layout.modality == media.modality).sum()
        if name in embeds:
            items, tokens, _ = embeds[name].shape
            check_count(count, items if name in given else 0, tokens, media.name)
            # Not masked_scatter, in whose backward the host waits for a GPU.
            place = (placeholders.flatten().cumsum(0) - 1).clamp(min=0).view(ids.shape)
            put = nn.functional.embedding(place, embeds[name].flatten(0, 1).to(inputs_embeds))
            inputs_embeds = torch.where(placeholders[..., None], put, inputs_embeds)
        elif counted and (backbone.training or ids.shape[1] > 1):
            check_count(count, 0, media.tokens_per_item, media.name)
    return inputs_embeds
