"""Pictures as they come to pictures as the model takes them: upright, 8-bit RGB, or a sentence that says why not."""

from __future__ import annotations

import base64
import io
import warnings
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 100_000_000
"""Larger pictures are refused before they are decoded: a small file can hold billions of pixels."""

_SHOWN = 200
"""Characters of a name that a message repeats: a string that should have been a path may be a whole file."""

_SIXTEEN_TO_EIGHT = [(value + 128) // 257 for value in range(65536)]
"""value / 257, rounded."""

_ORIENTATION = 0x0112
"""The EXIF tag; 1 is upright."""


class ImageError(ValueError):
    """A picture that cannot be read. `reason` is what counts of such pictures are kept by."""

    reason = "broken image"


class MissingImageError(ImageError):
    reason = "missing image"


class ImageSizeError(ImageError):
    reason = "absurd size"


def open_image(source: Any, *, timeout: float = 30.0) -> Image.Image:
    """Open a picture.

    The first frame of an animation is taken, EXIF rotation is applied, 16 bits are scaled to 8, palettes and CMYK
    become RGB, and what is transparent becomes white.

    Args:
        source: a path, an http(s) URL, a data URL, bytes, a PIL image, or an array (height, width, 3 or 4) of uint8.
        timeout: seconds, for URLs.

    Raises:
        ImageError: missing, not a picture, truncated, empty, or too large.
    """
    name = _describe(source)
    try:
        with warnings.catch_warnings():
            # Pillow warns from another number of pixels on than MAX_PIXELS.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = source if isinstance(source, Image.Image) else _open(source, timeout)
            _check_size(name, image)
            image.seek(0)
            image.load()
            # exif_transpose copies what is upright already.
            upright = image.getexif().get(_ORIENTATION, 1) == 1
            return _to_rgb(image if upright else ImageOps.exif_transpose(image))
    except ImageError:
        raise
    except FileNotFoundError as error:
        raise MissingImageError(f"there is no picture at {name}.") from error
    except IsADirectoryError as error:
        raise ImageError(f"{name} is a folder, not a picture.") from error
    except Image.DecompressionBombError as error:
        raise ImageSizeError(f"{name} is refused, it would unpack to too many pixels: {error}") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{name} is not a picture that Pillow can read.") from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ImageError(f"{name} could not be fetched: {error}") from error
    except Exception as error:
        # Pillow's decoders raise anything on a broken file: OSError, ValueError, IndexError, RuntimeError, ...
        raise ImageError(f"{name} is broken or truncated: {getattr(error, 'strerror', None) or error}") from error


def _check_size(name: str, image: Image.Image) -> None:
    if image.width == 0 or image.height == 0:
        raise ImageSizeError(f"{name} has no pixels ({image.width} x {image.height}).")
    if image.width * image.height > MAX_PIXELS:
        raise ImageSizeError(
            f"{name} has {image.width} x {image.height} pixels, more than the {MAX_PIXELS:,} that are allowed: "
            "scale it down first."
        )


def _open(source: Any, timeout: float) -> Image.Image:
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] not in (3, 4) or 0 in source.shape:
            raise ImageError(
                f"an array of shape {source.shape} and dtype {source.dtype} is not a picture: "
                "pass (height, width, 3 or 4) of uint8."
            )
        return Image.fromarray(source)
    if isinstance(source, bytes):
        return Image.open(io.BytesIO(source))
    if isinstance(source, Path):
        return Image.open(source)
    if not isinstance(source, str):
        raise ImageError(
            f"a {type(source).__name__} is not a picture: pass a path, a URL, bytes, an array or a PIL image."
        )
    if source.startswith(("http://", "https://")):
        response = httpx.get(source, timeout=timeout, follow_redirects=True)
        response.raise_for_status()
        return Image.open(io.BytesIO(response.content))
    if source.startswith("data:"):
        return Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2], validate=True)))
    return Image.open(source)


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
