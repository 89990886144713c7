"""Another process, which has a folder."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import aki.files

_HOLD = f"""
import sys
from pathlib import Path
from runpy import run_path
with run_path({aki.files.__file__!r})["alone"](Path(sys.argv[1]), "it"):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def holding(lock: Path) -> Iterator[int]:
    """A process that holds a lock until it is killed, which is the end of this block; gives its number."""
    other = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    try:
        yield other.pid
    finally:
        other.kill()
        other.communicate()
