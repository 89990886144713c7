"""Things: pictures with transparent ground and an English name, from folders laid out as Tux Paint's stamps are."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from zlib import crc32

from PIL import Image, ImageDraw, ImageFont

KINDS = {
    "animals": ("animal", "animals"),
    "food": ("food", "foods"),
    "plants": ("plant", "plants"),
    "vehicles": ("vehicle", "vehicles"),
    "clothes": ("piece of clothing", "pieces of clothing"),
    "household": ("household thing", "household things"),
    "town": ("thing from town", "things from town"),
    "space": ("thing from space", "things from space"),
}
"""Folder -> what one of its things is called, and several. `symbols` and its like are no things."""
HELD_OUT_ONE_IN = 10
"""Of the names, those that no question of training asks for."""
_CAPTION = re.compile(r"(?:(?:An?|The|Some|Our) )?([A-Za-z-]+(?: [A-Za-z-]+){0,2})[.!]?")
_ARTICLE = re.compile(r"(?:An?|The|Some|Our) ")
_EMOJI_PIXELS = 109
"""The one size in which the bitmap font Noto Color Emoji holds its pictures."""


class NoThings(ValueError):
    """Folders or a font without pictures of things."""


@dataclass(frozen=True)
class Thing:
    """A name and its pictures.

    Attributes:
        kind: a key of KINDS.
        pictures: PNG files, or one emoji.
    """

    name: str
    kind: str
    pictures: tuple[str, ...]

    @property
    def held_out(self) -> bool:
        """Whether training never asks for it."""
        return crc32(self.name.encode()) % HELD_OUT_ONE_IN == 0


def read_things(folders: Sequence[Path]) -> tuple[Thing, ...]:
    """The things of stamp folders: `KIND/**/NAME.png` with `NAME.txt` beside it, whose first line is the caption.

    A caption of one to three words behind an article, or of a single word, is a name; what has another is left out, as
    is a name that two kinds share.

    Raises:
        NoThings: there is none.
    """
    pictures: dict[str, dict[str, list[str]]] = {}
    for folder in folders:
        for kind in KINDS:
            for picture in sorted((folder / kind).rglob("*.png")):
                name = _name(picture.with_suffix(".txt"))
                if name:
                    pictures.setdefault(name, {}).setdefault(kind, []).append(str(picture))
    things = tuple(
        Thing(name, *((kind, tuple(files)) for kind, files in kinds.items()).__next__())
        for name, kinds in sorted(pictures.items())
        if len(kinds) == 1
    )
    if not things:
        raise NoThings(
            f"{', '.join(map(str, folders))}: no stamps: PNG pictures below {', '.join(KINDS)} with a caption in a "
            ".txt file beside each. Debian's package tuxpaint-stamps-default holds some; `make scenes` fetches it."
        )
    return things


def drawn_by_others(things: Sequence[Thing], font: Path) -> tuple[Thing, ...]:
    """The same things as emoji, where Unicode has one of that name.

    Args:
        font: Noto Color Emoji's file.

    Raises:
        NoThings: the font is not there.
    """
    if not font.is_file():
        raise NoThings(f"there is no font {font}; Debian's package fonts-noto-color-emoji holds one.")
    named = _emoji()
    return tuple(
        Thing(thing.name, thing.kind, (f"{font}#{named[thing.name]}",)) for thing in things if thing.name in named
    )


@lru_cache(maxsize=4096)
def picture(file: str, side: int) -> Image.Image:
    """A picture in RGBA without its empty border, its longer side `side` pixels."""
    image = _whole(file)
    scale = side / max(image.size)
    width, height = (max(1, round(edge * scale)) for edge in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _whole(file: str) -> Image.Image:
    font, _, emoji = file.partition("#")
    if not emoji:
        with Image.open(file, formats=["PNG"]) as opened:
            image = opened.convert("RGBA")
    else:
        image = Image.new("RGBA", (2 * _EMOJI_PIXELS,) * 2)
        ImageDraw.Draw(image).text((10, 10), emoji, font=_font(font), embedded_color=True)
    return image.crop(image.getchannel("A").point(lambda alpha: 255 * (alpha > 16)).getbbox())


@cache
def _font(file: str) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(file, _EMOJI_PIXELS)


def _name(caption: Path) -> str | None:
    if not caption.is_file():
        return None
    first = caption.read_text(encoding="utf-8-sig", errors="replace").partition("\n")[0].strip()
    found = _CAPTION.fullmatch(first)
    if found is None or (" " in found[1] and not _ARTICLE.match(first)):
        return None
    return found[1].lower()


@cache
def _emoji() -> dict[str, str]:
    """Name -> the emoji of that name, or of its face."""
    named: dict[str, str] = {}
    for code in [*range(0x1F300, 0x1F650), *range(0x1F680, 0x1F700), *range(0x1F900, 0x1FA00)]:
        name = unicodedata.name(chr(code), "").lower()
        named.setdefault(name.removesuffix(" face"), chr(code))
    return named
