"""Training's own image pre-processing: what transformers' image processor computes, in one pass over the pixels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature

from aki.models.processing import AkiProcessor

_STEPS = ("do_convert_rgb", "do_resize", "do_rescale", "do_normalize")
_OTHER_STEPS = ("do_center_crop", "do_pad")


class FastImages:
    """Stands in for an image processor that resizes to a fixed size, rescales and normalises (SigLIP's, AKI's).

    Pillow resizes; rescaling and normalising become one multiplication and one subtraction. Equal to the image
    processor within 1e-6.

    Args:
        processor: the image processor; everything but the pixels is left to it.

    Raises:
        ValueError: it does something else to a picture.
    """

    def __init__(self, processor: Any):
        extra = [step for step in _OTHER_STEPS if getattr(processor, step, None)]
        missing = [step for step in _STEPS if not getattr(processor, step, None)]
        if extra or missing or set(dict(processor.size)) != {"height", "width"}:
            raise ValueError(
                f"{type(processor).__name__} does not just resize to a fixed size, rescale and normalise "
                f"({', '.join(extra) or 'lacks ' + ', '.join(missing) if extra or missing else processor.size})."
            )
        self.processor = processor
        self.size = (processor.size["width"], processor.size["height"])
        self.resample = Image.Resampling(int(processor.resample))
        mean, std = (
            torch.tensor(getattr(processor, name), dtype=torch.float64) for name in ("image_mean", "image_std")
        )
        self.scale = (processor.rescale_factor / std).float()[:, None, None]
        self.shift = (mean / std).float()[:, None, None]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["processor"], name)

    def __call__(self, images: Sequence[Any], **kwargs: Any) -> BatchFeature:
        """As the image processor's call.

        Args:
            images: RGB pictures, or lists of them.

        Returns:
            `pixel_values`, (images, 3, height, width) float32.
        """
        return BatchFeature({"pixel_values": torch.stack([self.pixels(image) for image in _flat(images)])})

    def pixels(self, image: Image.Image) -> Tensor:
        """(3, height, width) float32 of one RGB picture."""
        resized = image if image.size == self.size else image.resize(self.size, self.resample)
        values = torch.from_numpy(np.array(resized)).permute(2, 0, 1)
        return values.to(torch.float32, memory_format=torch.contiguous_format).mul_(self.scale).sub_(self.shift)


def fast_processor(processor: AkiProcessor) -> AkiProcessor:
    """A copy of the processor whose pictures go the fast way, or the processor itself where there is none."""
    try:
        images = FastImages(processor.image_processor)
    except ValueError:
        return processor
    fast = copy(processor)
    fast.image_processor = images
    return fast


def _flat(images: Any) -> Iterator[Image.Image]:
    for image in images if isinstance(images, list | tuple) else [images]:
        yield from _flat(image) if isinstance(image, list | tuple) else [image]
