"""Files that are there whole or not at all, folders that one process has to itself, and checksums."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import xxhash

_READ_AT_ONCE = 16 << 20
"""Bytes."""


class InUseError(RuntimeError):
    """Another process, which is alive, has it."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write, which takes the place of `path` when it is whole; any number of writers on any machines may."""
    partial = path.with_name(f".{path.name}.{uuid4().hex}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write all of a JSON file or nothing of it; after a power cut too, it is whole."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        sync(partial)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum(path: Path) -> str:
    """XXH3 of a file, 128 bits in hexadecimal: 10 GB/s a core, so that the disk decides how long it takes."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_READ_AT_ONCE):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def alone(lock: Path, what: str) -> Iterator[None]:
    """Have something to oneself, against other processes, until the end of this block or of this process.

    Args:
        lock: a file, created if it is not there, which names who has it.
        what: is had, for the message.

    Raises:
        InUseError: another process has it.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    # A POSIX lock, because readers that this process forks would share one of flock's and could outlive it.
    with lock.open("a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                who = file.read().strip() or "another process"
                raise InUseError(f"{what} is in use by {who}: wait for its end, or choose another.") from None
            if error.errno != errno.ENOLCK:  # a network's file system may keep no locks
                raise
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
        file.flush()
        yield
