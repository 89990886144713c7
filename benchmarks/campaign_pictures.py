"""Pictures that are damaged in every way: a part of the campaign. Each opens as RGB, or is refused in a sentence."""

from __future__ import annotations

import io
import random
import time
import warnings

import numpy as np
from PIL import Image

from aki.models.images import ImageError, open_image

KINDS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
MODES = {"PNG": ("RGB", "RGBA", "L", "LA", "P", "1", "I;16"), "TIFF": ("RGB", "CMYK", "L", "F"), "GIF": ("P", "L")}
SECONDS = 5.0
"""That one small picture may take."""


def run(seed: int, tries: int) -> tuple[int, list[str]]:
    """
    Returns:
        The tries, and a sentence for each picture that raised anything else, took too long, or came out as no RGB.
    """
    draw, failures = random.Random(seed), []
    for number in range(tries):
        kind = draw.choice(KINDS)
        content = _mutated(_picture(draw, kind), draw)
        started = time.monotonic()
        failed = _failed(content)
        if failed is None and time.monotonic() - started > SECONDS:
            failed = f"it took {time.monotonic() - started:.0f} s"
        if failed is not None:
            failures.append(f"picture {number}, {kind}: {failed}")
    return tries, failures


def _failed(content: bytes) -> str | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = open_image(content)
        return None if image.mode == "RGB" and np.asarray(image).ndim == 3 else f"it is {image.mode} {image.size}"
    except ImageError as error:
        return None if str(error) and "\n" not in str(error) else f"the sentence is {str(error)!r}"
    except Exception as error:
        # Nothing else may be raised.
        return f"{type(error).__name__}: {error}"


def _picture(draw: random.Random, kind: str) -> bytes:
    shape = (draw.randrange(1, 64), draw.randrange(1, 64), 3)
    noise = np.frombuffer(draw.randbytes(shape[0] * shape[1] * 3), np.uint8).reshape(shape)
    mode = draw.choice(MODES.get(kind, ("RGB",)))
    image, file = Image.fromarray(noise), io.BytesIO()
    image = image.convert("I").convert(mode) if mode == "I;16" else image.convert(mode)
    exif = Image.Exif()
    exif[0x0112] = draw.randrange(12)
    options = {"exif": exif} if kind in ("JPEG", "PNG", "WEBP") else {}
    image.save(file, kind, **options)
    return file.getvalue()


def _mutated(content: bytes, draw: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(draw.choice((0, 1, 1, 2, 8))):
        start = draw.randrange(len(data))
        # Heads are where parsers go wrong.
        start = min(start, draw.randrange(80)) if draw.random() < 0.5 else start
        width = draw.randrange(1, 40)
        how = draw.choice(("bit", "noise", "zeros", "cut", "gone", "twice"))
        if how == "bit":
            data[start] ^= 1 << draw.randrange(8)
        elif how == "cut":
            del data[max(start, 1) :]
        elif how == "gone":
            del data[max(start, 1) : max(start, 1) + width]
        elif how == "twice":
            data[start:start] = data[start : start + width]
        else:
            data[start : start + width] = bytes(width) if how == "zeros" else draw.randbytes(width)
    return bytes(data)
