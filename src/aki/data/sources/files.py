"""Annotation files, read as a stream, and the folders that their pictures lie in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import ijson

from aki.data.report import BadSample, Reason

Paths = str | Path | Sequence[str | Path]
Row = dict[str, Any]
Columns = dict[str, str | list[str]]
"""The Arrow type of each column: string, int64, float64, or [one of them] for a list."""


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
        """The picture of that name, in the first folder that has it.

        A link is followed as long as it ends in one of the folders.

        Raises:
            BadSample: no such file, or a name that reaches outside.
        """
        if not name or "\0" in name:
            raise BadSample(Reason.MALFORMED, f"{name!r} names no image.")
        outside = f"{name!r} does not stay inside {', '.join(map(str, self.folders)) or 'any image folder'}."
        if PurePosixPath(name).is_absolute() or PureWindowsPath(name).drive or ".." in PurePosixPath(name).parts:
            raise BadSample(Reason.OUTSIDE_ROOT, outside)
        for folder in self.resolved:
            path = (folder / name).resolve()
            if path.is_file():
                if not any(path.is_relative_to(root) for root in self.resolved):
                    raise BadSample(Reason.OUTSIDE_ROOT, outside)
                return path
        raise BadSample(Reason.MISSING_IMAGE, f"there is no {name} in {', '.join(map(str, self.folders))}.")


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
    """A name for what is read from files: another one when a file's path, size or time of change differs."""
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr((stats, parts)).encode()).hexdigest()[:32]


def json_items(path: Path, prefix: str = "item") -> Iterator[Any]:
    """The values below a prefix of a JSON file, one after another ("item" is a list's entries)."""
    return _stream(path, prefix, ijson.items)


def json_pairs(path: Path, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The keys and values of an object in a JSON file, one after another."""
    return _stream(path, prefix, ijson.kvitems)


def _stream(path: Path, prefix: str, read: Callable[..., Iterator[Any]]) -> Iterator[Any]:
    with path.open("rb") as file:
        try:
            yield from read(file, prefix, use_float=True)
        except ijson.JSONError as error:
            raise SourceError(f"{path} is not whole and valid JSON: {error}") from error


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """The values of a JSONL file with their line numbers; a line that is no JSON is a BadSample in its place."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except ValueError as error:
                yield number, BadSample(Reason.MALFORMED, f"{path.name} line {number} is not JSON: {error}")
