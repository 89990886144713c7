"""Memory that is free goes back to the system."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache


def give_back() -> None:
    """What pictures took and left. Does nothing where the C library is not glibc.

    With the first large block that is freed glibc raises the size from which blocks are mapped, up to 32 MB, and keeps
    smaller ones, in an arena a thread: Pillow's are of 16 MB.
    """
    _trim()(0)


@cache
def _trim() -> Callable[[int], int]:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return lambda pad: 0
