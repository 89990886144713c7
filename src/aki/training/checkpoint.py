"""Checkpoints that can be trusted: each is on the disk before its mark, and the mark holds what each file was."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable
from pathlib import Path

from aki.files import checksum, sync, write_json

logger = logging.getLogger(__name__)

WHOLE = "WHOLE"
"""The mark: written into a checkpoint's folder after everything else."""

Sealed = dict[str, list[int | str]]
"""File -> its bytes and their checksum."""


class DamagedError(ValueError):
    """Files that are not what was written."""


def sealed(folder: Path, names: Iterable[str]) -> Sealed:
    """What files of a folder are, once they are on the disk."""
    found: Sealed = {}
    for name in sorted(names):
        sync(folder / name)
        found[name] = [(folder / name).stat().st_size, checksum(folder / name)]
    sync(folder)
    return found


def check_sealed(folder: Path, files: Sealed) -> None:
    """
    Raises:
        DamagedError: a file is not there, or another one than was sealed.
    """
    for name, (size, digest) in files.items():
        path = folder / name
        if not path.is_file():
            raise DamagedError(f"{path} is gone")
        if path.stat().st_size != size:
            raise DamagedError(f"{path} has {path.stat().st_size:,} bytes of {size:,}")
        if checksum(path) != digest:
            raise DamagedError(f"{path} is not what was written: its checksum is another")


def mark_whole(folder: Path) -> None:
    """Vouch for all that is in a checkpoint's folder."""
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    for below in (path for path in folder.rglob("*") if path.is_dir()):
        sync(below)
    write_json(folder / WHOLE, sealed(folder, (name for name in files if name != WHOLE)))
    sync(folder.parent)


def has_whole_checkpoint(folder: Path) -> bool:
    """Whether there is anything to resume from. Deletes nothing: another process may be writing there."""
    return any(folder.glob(f"checkpoint-*/{WHOLE}"))


def last_whole_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is what its mark says; damaged ones are named and passed over.

    Those without a mark, which a kill cut off, are deleted.

    Returns:
        None if none has a mark.

    Raises:
        DamagedError: all that have one are damaged.
    """
    damage = []
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=_step, reverse=True):
        if not (checkpoint / WHOLE).exists():
            shutil.rmtree(checkpoint)
            continue
        try:
            check_sealed(checkpoint, _read_mark(checkpoint / WHOLE))
        except DamagedError as error:
            damage.append(str(error))
            continue
        for one in damage:
            logger.warning("%s: going on from %s, the checkpoint before it.", one, checkpoint)
        return checkpoint
    if damage:
        raise DamagedError(f"no checkpoint in {folder} can be resumed from: {'; '.join(damage)}")
    return None


def _step(checkpoint: Path) -> int:
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1


def _read_mark(path: Path) -> Sealed:
    try:
        found = json.loads(path.read_bytes())
        return {name: [int(size), str(digest)] for name, (size, digest) in found.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise DamagedError(f"{path} does not say what was written (it is broken, or an older version's)") from error
