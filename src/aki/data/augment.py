"""Changes of a picture that a source may ask for, and what they do to boxes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from random import Random

from PIL import Image, ImageOps

Box = tuple[float, float, float, float]
"""x1, y1, x2, y2 as shares of the picture's width and height, 0 to 1."""

_SIDES = re.compile(r"\b(left|right)", re.IGNORECASE)


@dataclass(frozen=True)
class Augment:
    """What may be done to a source's pictures. Off where a source says nothing: it can change answers.

    Attributes:
        flip: mirror half of the pictures, except where the text speaks of left or right.
        crop: the smallest share of width and height that a crop keeps; 1 crops nothing.
    """

    flip: bool = False
    crop: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.crop <= 1:
            raise ValueError(
                f"augment.crop is the share that a crop keeps, more than 0 and at most 1, not {self.crop}."
            )

    def draw(self, rng: Random, text: str, keep: Box | None = None) -> View:
        """A view of one picture.

        Args:
            text: all that is said about it.
            keep: what must stay inside, whole.
        """
        width, height = (rng.uniform(self.crop, 1) for _ in range(2))
        left, top = rng.uniform(0, 1 - width), rng.uniform(0, 1 - height)
        mirrored = rng.random() < 0.5
        window = (left, top, left + width, top + height)
        if keep is not None:
            window = (
                min(window[0], keep[0]),
                min(window[1], keep[1]),
                max(window[2], keep[2]),
                max(window[3], keep[3]),
            )
        return View(window, self.flip and mirrored and not _SIDES.search(text))


@dataclass(frozen=True)
class View:
    """A part of a picture, mirrored or not.

    Attributes:
        window: the part, in shares of the whole.
    """

    window: Box
    mirrored: bool

    def picture(self, image: Image.Image) -> Image.Image:
        x1, y1, x2, y2 = self.window
        corners = (x1 * image.width, y1 * image.height, x2 * image.width, y2 * image.height)
        left, top, right, bottom = (round(corner) for corner in corners)
        cut = image.crop((left, top, max(right, left + 1), max(bottom, top + 1)))
        return ImageOps.mirror(cut) if self.mirrored else cut

    def box(self, box: Box) -> Box:
        """Where a box of the whole picture stands in this view, cut at its edges."""
        x1, y1, x2, y2 = self.window
        left, right = ((min(max(x, x1), x2) - x1) / (x2 - x1) for x in (box[0], box[2]))
        top, bottom = ((min(max(y, y1), y2) - y1) / (y2 - y1) for y in (box[1], box[3]))
        return (1 - right, top, 1 - left, bottom) if self.mirrored else (left, top, right, bottom)
