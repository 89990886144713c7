"""Pictures as they come to pictures as the model takes them: upright, 8-bit RGB, or a sentence that says why not."""

from __future__ import annotations

import base64
import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image, UnidentifiedImageError

MAX_PIXELS = 100_000_000
"""Larger pictures are refused before they are decoded: a small file can hold billions of pixels."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
"""What is opened, whatever a file is called: Pillow knows dozens more, and some of them start other programs."""

_SHOWN = 200
"""Characters of a name that a message repeats: a string that should have been a path may be a whole file."""

_PNG = b"\x89PNG\r\n\x1a\n"
_SIXTEEN_TO_EIGHT = [(value + 128) // 257 for value in range(65536)]
"""value / 257, rounded."""

_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The EXIF tag, and what makes a picture of such an orientation upright (EXIF 2.32, 4.6.4.A)."""


class ImageError(ValueError):
    """A picture that cannot be read. `reason` is what counts of such pictures are kept by."""

    reason = "broken image"


class MissingImageError(ImageError):
    reason = "missing image"


class ImageSizeError(ImageError):
    reason = "absurd size"


def open_image(source: Any, *, timeout: float = 30.0) -> Image.Image:
    """Open a picture.

    The first frame of an animation is taken, EXIF rotation is applied where it can be read, 16 bits are scaled to 8,
    palettes and CMYK become RGB, and what is transparent becomes white.

    Args:
        source: a path, an http(s) URL, a data URL, bytes (each of a file in one of FORMATS), an array (height, width, 3
            or 4) of uint8, or a PIL image, of which the frame is taken that it stands at.
        timeout: seconds, for URLs.

    Raises:
        ImageError: missing, not a picture, truncated, empty, or too large.
    """
    name = _describe(source)
    try:
        with warnings.catch_warnings():
            # Pillow warns from another number of pixels on than MAX_PIXELS.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = _loaded(name, source if isinstance(source, Image.Image) else _open(name, source, timeout))
            opened = _to_rgb(_upright(image))
            # An animation that is a caller's shows another frame when it goes on.
            return opened.copy() if opened is source and getattr(source, "is_animated", False) else opened
    except ImageError:
        raise
    except FileNotFoundError as error:
        raise MissingImageError(f"there is no picture at {name}.") from error
    except IsADirectoryError as error:
        raise ImageError(f"{name} is a folder, not a picture.") from error
    except Image.DecompressionBombError as error:
        raise ImageSizeError(f"{name} is refused, it would unpack to too many pixels: {error}") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{name} is not a picture ({', '.join(FORMATS)}).") from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ImageError(f"{name} could not be fetched: {error}") from error
    except Exception as error:
        # Pillow's decoders raise anything on a broken file: OSError, ValueError, IndexError, RuntimeError, ...
        raise ImageError(f"{name} is broken or truncated: {getattr(error, 'strerror', None) or error}") from error


def _upright(image: Image.Image) -> Image.Image:
    """The picture as its EXIF says that it stands; as it is stored, which viewers do too, where that cannot be read."""
    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:
        # Pillow's parsers raise anything.
        return image
    if turn is None:
        return image
    turned = image.transpose(turn)
    # Opened again, it is not to be turned again.
    turned.info = {name: value for name, value in image.info.items() if name == "transparency"}
    return turned


def _check_size(name: str, image: Image.Image) -> None:
    if image.width == 0 or image.height == 0:
        raise ImageSizeError(f"{name} has no pixels ({image.width} x {image.height}).")
    if image.width * image.height > MAX_PIXELS:
        raise ImageSizeError(
            f"{name} has {image.width} x {image.height} pixels, more than the {MAX_PIXELS:,} that are allowed: "
            "scale it down first."
        )


def _loaded(name: str, image: Image.Image) -> Image.Image:
    _check_size(name, image)
    image.load()
    return image


def _open(name: str, source: Any, timeout: float) -> Image.Image:
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] not in (3, 4) or 0 in source.shape:
            raise ImageError(
                f"an array of shape {source.shape} and dtype {source.dtype} is not a picture: "
                "pass (height, width, 3 or 4) of uint8."
            )
        return Image.fromarray(source)
    if isinstance(source, bytes):
        return _open_file(name, io.BytesIO(source))
    if isinstance(source, Path):
        return _open_file(name, source)
    if not isinstance(source, str):
        raise ImageError(
            f"a {type(source).__name__} is not a picture: pass a path, a URL, bytes, an array or a PIL image."
        )
    if source.startswith(("http://", "https://")):
        response = httpx.get(source, timeout=timeout, follow_redirects=True)
        response.raise_for_status()
        return _open_file(name, io.BytesIO(response.content))
    if source.startswith("data:"):
        return _open_file(name, io.BytesIO(base64.b64decode(source.partition(",")[2], validate=True)))
    return _open_file(name, source)


def _open_file(name: str, file: Any) -> Image.Image:
    try:
        return _loaded(name, Image.open(file, formats=FORMATS))
    except (ImageError, FileNotFoundError, IsADirectoryError):
        raise
    except Exception:
        content = file.getvalue() if isinstance(file, io.BytesIO) else _png_content(file)
        if not content.startswith(_PNG):
            raise
        return Image.open(io.BytesIO(_pixels_alone(content)), formats=FORMATS)


def _png_content(path: str | Path) -> bytes:
    with open(path, "rb") as file:
        start = file.read(len(_PNG))
        return start + file.read() if start == _PNG else b""


def _pixels_alone(png: bytes) -> bytes:
    """A PNG without the chunks that its pixels do not need, which Pillow, unlike viewers, wants to be whole.

    Transparency and EXIF are kept where their checksums hold (PNG 3rd edition, 5.3 and 5.4).
    """
    kept, place = [_PNG], len(_PNG)
    while place + 12 <= len(png):
        length, kind = struct.unpack_from(">I4s", png, place)
        chunk = png[place : place + 12 + length]
        critical = not kind[0] & 0x20
        if critical or (kind in (b"tRNS", b"eXIf") and zlib.crc32(chunk[4:-4]).to_bytes(4, "big") == chunk[-4:]):
            kept.append(chunk)
        place += len(chunk)
    return b"".join([*kept, png[place:]])


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        # 16-bit files may open as 32-bit integers, which this clips to 16 bits.
        return image.convert("I").point(_SIXTEEN_TO_EIGHT, "L").convert("RGB")
    if image.mode == "F":
        values = np.asarray(image, dtype=np.float64)  # taken as 0 to 1
        return Image.fromarray(np.clip(values * 255.0, 0, 255).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _describe(source: Any) -> str:
    if isinstance(source, str):
        return "the data URL" if source.startswith("data:") else source[:_SHOWN]
    if isinstance(source, Path):
        return str(source)
    return getattr(source, "filename", None) or f"the {type(source).__name__} given"
