"""A scene: things of three sizes and plates with words at the places of a grid, on plain, shaded or textured ground."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from aki.data.scenes.things import Thing, picture

PIXELS, PLACES = 192, 4
"""Of a picture's side: patches of 16 are 144 tokens, as the paper's. Of a row and a column."""
CELL = PIXELS // PLACES
SIDES = (24, 33, 46)
"""Pixels of a small, a middling and a large thing: each is plainly larger than the one before."""
FONTS = ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSerif.ttf", "DejaVuSansMono.ttf", "DejaVuSerif-Italic.ttf")
PLATE_SIZES = (11, 13)
PLATE_LOOKS = len(FONTS) * len(PLATE_SIZES)
FEW = 4
"""Things of a kind, below which it is not drawn more often than others."""


@dataclass(frozen=True)
class Placed:
    """What stands at a place: a thing, or a plate with a word.

    Attributes:
        row, column: of the grid, from the top left.
        size: an index of SIDES; -1 for a plate.
        variant: which of the thing's pictures, or which font.
    """

    row: int
    column: int
    thing: Thing | None = None
    word: str = ""
    size: int = -1
    variant: int = 0
    shift: tuple[float, float] = (0.5, 0.5)

    @property
    def name(self) -> str:
        return self.thing.name if self.thing else self.word

    @property
    def kind(self) -> str:
        return self.thing.kind if self.thing else "plate"

    def beside(self, other: Placed) -> bool:
        """Directly left of it, right of it, above or below."""
        return abs(self.row - other.row) + abs(self.column - other.column) == 1


@dataclass(frozen=True)
class Scene:
    """
    Attributes:
        placed: by place, row by row; no name and no word twice.
        ground: seed of the ground.
    """

    placed: tuple[Placed, ...]
    ground: int

    @property
    def things(self) -> list[Placed]:
        return [one for one in self.placed if one.thing is not None]

    @property
    def plates(self) -> list[Placed]:
        return [one for one in self.placed if one.thing is None]

    def draw(self) -> Image.Image:
        """An RGB picture of PIXELS x PIXELS."""
        canvas = ground(np.random.default_rng(self.ground))
        for one in self.placed:
            drawn = plate(one.word, one.variant) if one.thing is None else _look(one)
            free = (CELL - drawn.width, CELL - drawn.height)
            left, top = (
                origin + round(shift * room)
                for origin, shift, room in zip(self._corner(one), one.shift, free, strict=True)
            )
            canvas.paste(drawn, (left, top), drawn)
        return canvas

    @staticmethod
    def _corner(one: Placed) -> tuple[int, int]:
        return one.column * CELL, one.row * CELL


def make_scene(
    rng: np.random.Generator, things: Sequence[Thing], words: Sequence[str], count: tuple[int, int] = (3, 10)
) -> Scene:
    """
    Args:
        things, words: what is drawn from. Two kinds are drawn more often than the others, so that there is to count.
        count: least and most things; up to three plates come to them where there is room.
    """
    number = int(rng.integers(count[0], count[1] + 1))
    plates = int(rng.integers(0, min(3, PLACES**2 - number) + 1))
    places = rng.permutation(PLACES**2)[: number + plates]
    chosen = _draw_things(rng, things, number)
    written = [words[i] for i in rng.choice(len(words), plates, replace=False)]
    placed = []
    for order, place in enumerate(places.tolist()):
        row, column = divmod(place, PLACES)
        shift = tuple(rng.random(2).tolist())
        if order < number:
            thing, size = chosen[order], int(rng.integers(len(SIDES)))
            variant = int(rng.integers(len(thing.pictures)))
            placed.append(Placed(row, column, thing, size=size, variant=variant, shift=shift))
        else:
            variant = int(rng.integers(PLATE_LOOKS))
            placed.append(Placed(row, column, word=written[order - number], variant=variant, shift=shift))
    return Scene(tuple(sorted(placed, key=lambda one: (one.row, one.column))), int(rng.integers(2**32)))


def _draw_things(rng: np.random.Generator, things: Sequence[Thing], number: int) -> list[Thing]:
    by_kind = _by_kind(tuple(things))
    kinds = [kind for kind, members in by_kind.items() if len(members) >= FEW]
    favoured = [kinds[i] for i in rng.permutation(len(kinds))[:2]]
    chosen: dict[str, Thing] = {}
    while len(chosen) < number:
        drawn = by_kind[favoured[int(rng.integers(2)) % len(favoured)]] if rng.random() < 0.6 else things
        thing = drawn[int(rng.integers(len(drawn)))]
        chosen[thing.name] = thing
    return list(chosen.values())


@cache
def _by_kind(things: tuple[Thing, ...]) -> dict[str, list[Thing]]:
    kinds: dict[str, list[Thing]] = {}
    for thing in things:
        kinds.setdefault(thing.kind, []).append(thing)
    return kinds


def _look(one: Placed) -> Image.Image:
    assert one.thing is not None
    return picture(one.thing.pictures[one.variant], SIDES[one.size])


@cache
def _font(variant: int) -> ImageFont.FreeTypeFont:
    import matplotlib  # ships DejaVu's files, so that a scene is the same wherever it is drawn

    name, size = FONTS[variant % len(FONTS)], PLATE_SIZES[variant // len(FONTS)]
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


@cache
def plate(word: str, variant: int) -> Image.Image:
    """A light plate with a dark word, RGBA, no wider than a place."""
    font = _font(variant)
    left, top, right, bottom = font.getbbox(word)
    width, height = round(right - left) + 6, round(bottom - top) + 6
    drawn = Image.new("RGBA", (width, height), (250, 248, 235, 255))
    pen = ImageDraw.Draw(drawn)
    pen.rectangle((0, 0, width - 1, height - 1), outline=(60, 50, 40, 255))
    pen.text((3 - left, 3 - top), word, font=font, fill=(25, 20, 15, 255))
    return drawn if width <= CELL else drawn.resize((CELL, height), Image.Resampling.LANCZOS)


def ground(rng: np.random.Generator) -> Image.Image:
    """Plain, shaded from one edge to the other, or textured; of a muted colour."""
    colour = rng.integers(90, 230, 3).astype(np.float32)
    look = int(rng.integers(3))
    if look == 0:
        return Image.new("RGB", (PIXELS, PIXELS), tuple(int(value) for value in colour))
    if look == 1:
        slope = np.linspace(-40, 40, PIXELS, dtype=np.float32)
        shade = np.broadcast_to(slope if rng.random() < 0.5 else slope[:, None], (PIXELS, PIXELS))
    else:
        coarse = rng.normal(0, 18, (PIXELS // 8, PIXELS // 8)).astype(np.float32)
        shade = np.asarray(Image.fromarray(coarse).resize((PIXELS, PIXELS), Image.Resampling.BILINEAR))
    return Image.fromarray(np.clip(colour + shade[..., None], 0, 255).astype(np.uint8))
