"""Of which patches of a picture each image token is made."""

from __future__ import annotations

import math
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from aki.models.connectors import computation_dtype
from aki.models.rule import base_model


def token_patches(model: Any, processor: Any, inputs: dict[str, Tensor], tokens: int) -> Tensor:
    """(tokens, rows, columns) for the one picture in these inputs; what a token is made of sums to 1.

    A connector that says of which features its embeddings are made (`feature_weights`, the resampler) is asked. All
    others keep the order of patches: their tokens are a grid over the picture.

    Raises:
        ValueError: the tokens are no grid, as where pictures are cut into tiles.
    """
    if tokens == 0:
        raise ValueError("there are no image tokens in this prompt: the model was given no picture.")
    base = base_model(model)
    if base.config.model_type != "aki":
        return _identity(*_grid_of_others(processor, inputs, tokens))
    media = base.config.media["pixel_values"]
    connector = base.model.get_submodule(media.connector)
    rows, columns = media.patch_grid
    if not hasattr(connector, "feature_weights"):
        return _identity(*_nearest_grid(tokens, rows / columns))
    with torch.no_grad():
        features = base.patch_features(inputs["pixel_values"])
        weights = connector.feature_weights(features.to(computation_dtype(connector, features.dtype)))
    return weights[0].float().unflatten(-1, (rows, columns))


def region_read(picture: Image.Image, processor: Any) -> Image.Image:
    """The part of a picture that reaches the encoder: all of it, unless the image processor crops its middle."""
    image_processor = getattr(processor, "image_processor", None)
    crop = getattr(image_processor, "crop_size", None)
    if not getattr(image_processor, "do_center_crop", False) or crop is None:
        return picture
    height, width = crop["height"], crop["width"]
    scale = min(picture.height / height, picture.width / width)
    height, width = round(height * scale), round(width * scale)
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))


def _grid_of_others(processor: Any, inputs: dict[str, Tensor], tokens: int) -> tuple[int, int]:
    if inputs.get("image_grid_thw") is not None:
        _, rows, columns = inputs["image_grid_thw"][0].tolist()
        merged = getattr(getattr(processor, "image_processor", None), "merge_size", 1)
        return rows // merged, columns // merged
    pixels = inputs.get("pixel_values")
    if pixels is None or pixels.ndim != 4 or pixels.shape[0] != 1:
        raise ValueError(
            "this model cuts a picture into several, so that its tokens are no grid over the picture: it answers, but "
            "what its tokens read cannot be drawn."
        )
    return _nearest_grid(tokens, pixels.shape[-2] / pixels.shape[-1])


def _nearest_grid(tokens: int, aspect: float) -> tuple[int, int]:
    """Rows and columns of so many tokens, nearest to rows / columns = aspect."""
    grids = [(rows, tokens // rows) for rows in range(1, tokens + 1) if tokens % rows == 0]
    rows, columns = min(grids, key=lambda grid: abs(math.log(grid[0] / grid[1] / aspect)))
    if abs(math.log(rows / columns / aspect)) > math.log(1.5):
        raise ValueError(f"{tokens} image tokens are no grid over the picture: what they read cannot be drawn on it.")
    return rows, columns


def _identity(rows: int, columns: int) -> Tensor:
    return torch.eye(rows * columns).unflatten(-1, (rows, columns))
