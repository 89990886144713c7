"""Annotation files, read as a stream, and the folders that their pictures lie in."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
from codecs import BOM_UTF8
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import ijson

from aki.data.report import BadSample, Reason

Paths = str | Path | Sequence[str | Path]
Row = dict[str, Any]
Columns = dict[str, str | list[str]]
"""The Arrow type of each column: string, int64, float64, or [one of them] for a list."""

_HALF_PAIR = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB]..)\\u[dD][c-fC-F][0-9a-fA-F]{2}", re.DOTALL
)
"""What may be half of a surrogate pair in JSON."""


class SourceError(ValueError):
    """Annotations that cannot be read at all: no such file, another format."""


class ImageRoots:
    """The folders that pictures may come from."""

    def __init__(self, folders: Paths | None):
        self.folders = [] if folders is None else [Path(folder) for folder in as_list(folders)]
        for folder in self.folders:
            if not folder.is_dir():
                raise SourceError(f"there is no folder of images at {folder}.")
        self.resolved = [folder.resolve() for folder in self.folders]

    def find(self, name: str) -> Path:
        """The file of that name, in the first folder that has it.

        Raises:
            BadSample: no such file, or a name or a link that reaches outside.
        """
        if not name or "\0" in name:
            raise BadSample(Reason.MALFORMED, f"{name!r} names no image.")
        if "://" in name:
            raise BadSample(Reason.MISSING_IMAGE, f"{name} is an address: download the picture into the image folder.")
        where = ", ".join(map(str, self.folders)) or "any image folder (none is given)"
        try:
            paths = [(folder / name).resolve() for folder in self.resolved]
            inside = [path for path in paths if any(path.is_relative_to(root) for root in self.resolved)]
            if not inside:
                raise BadSample(Reason.OUTSIDE_ROOT, f"{name!r} is not inside {where}.")
            found = next((path for path in inside if path.is_file()), None)
        except (OSError, RuntimeError, UnicodeError) as error:  # too long a name, a circle of links, no rights
            raise BadSample(Reason.MISSING_IMAGE, f"{name[:100]!r} cannot be looked up: {error}") from error
        if found is None:
            raise BadSample(Reason.MISSING_IMAGE, f"there is no {name} in {where}.")
        return found


def as_list(paths: Paths) -> list[str | Path]:
    return [paths] if isinstance(paths, str | Path) else list(paths)


def find_files(annotations: Paths, names: Sequence[str]) -> list[Path]:
    """The annotation files: those given, or in a given folder those of the released names.

    Raises:
        SourceError: one is not there, or there are too few.
    """
    given = [Path(path) for path in as_list(annotations)]
    if names and len(given) == 1 and given[0].is_dir():
        given = [given[0] / name for name in names]
    if names and len(given) != len(names):
        raise SourceError(f"annotations should be a folder with {' and '.join(names)}, or these {len(names)} file(s).")
    for path in given:
        if not path.exists():
            raise SourceError(f"there are no annotations at {path}.")
    return given


def fingerprint(files: Iterable[Path], *parts: object) -> str:
    """A name for what is read from files: another one when a file's path, size or time of change differs.

    Of a folder the times of all folders below count, which change when a file comes or goes.
    """
    stats = [_stat(Path(place)) for file in files for place in _places(file)]
    return hashlib.sha256(repr((stats, parts)).encode()).hexdigest()[:32]


def _places(file: Path) -> list[str]:
    return sorted(place for place, _, _ in os.walk(file)) if file.is_dir() else [str(file)]


def _stat(path: Path) -> tuple[str, int, int]:
    stat = path.stat()
    return str(path.resolve()), stat.st_size, stat.st_mtime_ns


def json_items(path: Path, prefix: str = "item") -> Iterator[Any]:
    """The values below a prefix of a JSON file, one after another ("item" is a list's entries)."""
    return _stream(path, prefix, "items")


def json_pairs(path: Path, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The keys and values of an object in a JSON file, one after another."""
    return _stream(path, prefix, "kvitems")


def _stream(path: Path, prefix: str, how: str) -> Iterator[Any]:
    with path.open("rb") as file:
        # The fast parser ends at half of a surrogate pair; the slow one leaves it to be counted with its entry.
        parser = ijson.get_backend("python") if _has_half_pair(file) else ijson
        read: Callable[..., Iterator[Any]] = getattr(parser, how)
        if file.read(len(BOM_UTF8)) != BOM_UTF8:
            file.seek(0)
        try:
            yield from read(file, prefix, use_float=True)
        except ijson.JSONError as error:
            said = error.args[0].decode(errors="replace") if isinstance(error.args[0], bytes) else str(error)
            raise SourceError(f"{path} is not whole and valid JSON: {said.splitlines()[0]}") from error


def _has_half_pair(file: BinaryIO) -> bool:
    if not os.fstat(file.fileno()).st_size:
        return False
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return _HALF_PAIR.search(content) is not None


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """The values of a JSONL file with their line numbers; a line that is no JSON is a BadSample in its place.

    Of a file that is one list, as LLaMA-Factory's are, its items with their numbers.
    """
    with path.open("rb") as file:
        if file.read(64).lstrip().startswith(b"["):
            file.seek(0)
            try:
                yield from enumerate(json.load(file), 1)
                return
            except (ValueError, RecursionError):
                pass  # lines that are lists, or no JSON
        file.seek(0)
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                yield number, BadSample(Reason.MALFORMED, f"{path.name} line {number} is not JSON: {error}")
