"""Images of requests: data URLs, and where it is allowed what public web servers have. Never a path."""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import warnings

from PIL import Image

from aki.apps.serve.limits import Limits, Refused
from aki.apps.serve.remote import fetch
from aki.models.images import ImageError, open_image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""Pillow knows dozens more; some start other programs, few have been attacked as much as these."""


async def image_files(urls: list[str], limits: Limits, remote: bool) -> list[bytes]:
    """The files that the image parts of a request name.

    Args:
        remote: whether http and https are allowed. All that are fetched share the size and the time of one body.

    Raises:
        Refused: a string is no data URL and no URL that is allowed, or the files are too large.
    """
    files, fetched = [], 0
    until = asyncio.get_running_loop().time() + limits.patience
    for url in urls:
        scheme = url.partition(":")[0].lower()
        if scheme == "data":
            files.append(_decoded(url))
        elif scheme in ("http", "https") and remote:
            files.append(await fetch(url, limits, fetched, until))
            fetched += len(files[-1])
        else:
            allowed = "a data URL, or an http(s) URL" if remote else "a data URL (this server fetches no remote images)"
            raise _refused(f"an image must be {allowed}.", "invalid_image_url")
    return files


def decoded_image(data: bytes, limits: Limits) -> Image.Image:
    """The picture in a file, upright and RGB.

    Raises:
        Refused: not a picture of a known format, broken, or of too many pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > limits.max_megapixels * 1_000_000:
            raise _refused(
                f"an image has {image.width} x {image.height} pixels, more than the {limits.max_megapixels} megapixels "
                "that this server takes: scale it down first.",
                "too_many_pixels",
            )
        return open_image(image)
    except ImageError as error:
        raise _refused(f"an image cannot be read: {error}", "invalid_image") from error
    except Image.DecompressionBombError as error:
        raise _refused("an image would unpack to too many pixels.", "too_many_pixels") from error
    except Refused:
        raise
    except Exception as error:  # Pillow's parsers raise anything on a broken header.
        formats = ", ".join(FORMATS)
        raise _refused(f"an image is broken, or of another format than {formats}.", "invalid_image") from error


def _decoded(url: str) -> bytes:
    head, comma, data = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise _refused("a data URL must have the form data:image/png;base64,...", "invalid_image_url")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise _refused("an image's data URL is not whole base64.", "invalid_image") from error


def _refused(message: str, code: str) -> Refused:
    return Refused(400, message, code, "messages")
