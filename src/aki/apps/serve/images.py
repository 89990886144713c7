"""Images of requests: data URLs, and where it is allowed what public web servers have. Never a path."""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import time
import warnings
from collections.abc import Callable
from functools import partial
from urllib.parse import unquote

from PIL import Image

from aki.apps.serve.limits import Limits, Refused
from aki.apps.serve.remote import fetch
from aki.models.images import ImageError, open_image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""Pillow knows dozens more; some start other programs, few have been attacked as much as these."""
DECODING = 5
"""Seconds of a processor that the images of a request may take: what a JPEG costs is its pixels times its scans."""
_PIECE = 1024
"""Bytes of an image that are decoded at a time."""


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


def decoded_images(
    files: list[bytes], limits: Limits, is_over: Callable[[], bool] = lambda: False
) -> list[Image.Image]:
    """The pictures in files, upright and RGB.

    Args:
        is_over: asked again and again; once it says so, nobody wants the pictures any more.

    Raises:
        Refused: not a picture of a known format, broken, of too many pixels together, or of too much work.
    """
    end = time.thread_time() + DECODING

    def check() -> None:
        if is_over():
            raise Refused(499, "nobody is there for this request.", "gone")
        if time.thread_time() > end:
            message = f"the images take more than {DECODING} seconds to decode: save them anew, as plain JPEG or PNG."
            raise _refused(message, "too_slow_to_decode")

    opened = [_read(partial(Image.open, _Watched(file, check), formats=FORMATS)) for file in files]
    if sum(image.width * image.height for image in opened) > limits.max_megapixels * 1_000_000:
        sizes = ", ".join(f"{image.width} x {image.height}" for image in opened)
        raise _refused(
            f"the images have {sizes} pixels, more than the {limits.max_megapixels} megapixels that this server takes "
            "for a request: scale them down first.",
            "too_many_pixels",
        )
    return [_read(partial(_upright, image)) for image in opened]


class _Watched(io.BytesIO):
    """A file that calls back with each piece that is read of it, so that the reading can end."""

    def __init__(self, data: bytes, check: Callable[[], None]):
        super().__init__(data)
        self._check = check

    def read(self, size: int | None = -1, /) -> bytes:
        self._check()
        return super().read(size)


def _upright(image: Image.Image) -> Image.Image:
    image.decodermaxblock = _PIECE  # type: ignore[attr-defined]
    image.load()
    return open_image(image)


def _read(step: Callable[[], Image.Image]) -> Image.Image:
    """
    Raises:
        Refused: what the step raises, as a sentence.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return step()
    except Refused:
        raise
    except ImageError as error:
        raise _refused(f"an image cannot be read: {error}", "invalid_image") from error
    except Image.DecompressionBombError as error:
        raise _refused("an image would unpack to too many pixels.", "too_many_pixels") from error
    except Exception as error:  # Pillow's parsers raise anything on a broken header.
        formats = ", ".join(FORMATS)
        raise _refused(f"an image is broken, or of another format than {formats}.", "invalid_image") from error


def _decoded(url: str) -> bytes:
    head, comma, data = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise _refused("a data URL must have the form data:image/png;base64,...", "invalid_image_url")
    data = "".join(unquote(data).split()).rstrip("=")
    try:
        return base64.b64decode(data + "=" * (-len(data) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise _refused("an image's data URL is not whole base64.", "invalid_image") from error


def _refused(message: str, code: str) -> Refused:
    return Refused(400, message, code, "messages")
