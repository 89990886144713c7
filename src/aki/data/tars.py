"""Samples in tars, read as streams: every file, and in their place what could not be read."""

from __future__ import annotations

import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from webdataset.gopen import gopen

from aki.data.report import BadSample

PICTURES = ("jpg", "png", "jpeg")
CAPTION = "txt"
RECORD = 10240
"""Bytes that tar, Python's and GNU's, fills the end of an archive up to."""
RUN = 32
"""Files with one name up to its first dot that are looked at together, at least."""

Loss = Callable[[str], BadSample]
"""From what is wrong to the sample that counts it."""


@dataclass(frozen=True)
class File:
    """A member of a tar. `content` is None where it has none of its own: a link, a device, a file with holes."""

    name: str
    content: bytes | None


@dataclass(frozen=True)
class Member:
    """A sample's files by their extensions, in lower case and without the dot, and the shard that they are in."""

    key: str
    url: str
    files: dict[str, bytes | None] = field(default_factory=dict)


def members(url: str, lost: Loss) -> Iterator[Member | BadSample]:
    """The samples of a tar, and a BadSample for whatever of it cannot be read.

    Files that stand side by side are one sample if their names are the same up to the first dot, as webdataset has it.
    Where no file of that name is a picture or a caption by its whole extension (`photo.000123.jpg`), the last dot
    decides. Where both could be meant, the first does, and a BadSample says what that left out.

    Args:
        url: a path or anything that webdataset opens.
        lost: makes a BadSample of a sentence.
    """
    run: list[File] = []
    for file in _files(url, lost):
        if isinstance(file, BadSample):
            yield file
            continue
        before = run[-1].name if run else ""
        full = len(run) >= RUN and _by_last_dot(file.name)[0] != _by_last_dot(before)[0]
        if run and (full or _by_first_dot(file.name)[0] != _by_first_dot(before)[0]):
            yield from _samples(run, url, lost)
            run = []
        run.append(file)
    yield from _samples(run, url, lost)


def _samples(run: list[File], url: str, lost: Loss) -> Iterator[Member | BadSample]:
    """Of files whose names are the same up to the first dot."""
    first = any(_by_first_dot(file.name)[1] in (*PICTURES, CAPTION) for file in run)
    split, member = _by_first_dot if first else _by_last_dot, None
    for file in run:
        key, extension = split(file.name)
        if member is None or member.key != key or extension in member.files:
            if member is not None:
                yield member
            member = Member(key, url)
        member.files[extension] = file.content
    if member is not None:
        yield member
    if first:
        yield from _passed_over(run, lost)


def _passed_over(run: list[File], lost: Loss) -> Iterator[BadSample]:
    """Pictures with a caption that the first dot makes further files of another sample."""
    extensions = defaultdict[str, set[str]](set)
    for file in run:
        if "." in _by_first_dot(file.name)[1]:
            key, extension = _by_last_dot(file.name)
            extensions[key].add(extension)
    for key, found in extensions.items():
        if CAPTION in found and found.intersection(PICTURES):
            yield lost(
                f"{key!r} has a picture and a caption, but by the first dot of its name it belongs to the sample "
                f"{_by_first_dot(run[0].name)[0]!r}: names of samples should have no dots."
            )


def _by_first_dot(name: str) -> tuple[str, str]:
    folder, slash, file = name.rpartition("/")
    shown = file.lstrip(".")
    stem, _, extension = shown.partition(".")
    return folder + slash + file[: len(file) - len(shown)] + stem, extension.lower()


def _by_last_dot(name: str) -> tuple[str, str]:
    key, extension = _by_first_dot(name)
    rest, dot, last = extension.rpartition(".")
    return (name[: len(name) - len(last) - 1], last) if dot and rest else (key, extension)


def _files(url: str, lost: Loss) -> Iterator[File | BadSample]:
    place = 0
    try:
        with closing(gopen(url)) as stream, _Tar.open(fileobj=stream, mode="r|*", ignore_zeros=True) as tar:
            for info in tar:
                place = info.offset
                yield from map(lost, tar.losses())
                if not (info.isdir() or _is_leftover(info.name)):
                    plain = info.isreg() and not info.issparse()
                    yield File(info.name, tar.extractfile(info).read() if plain else None)  # type: ignore[union-attr]
                tar.members.clear()
            yield from map(lost, tar.losses())
    except Exception as error:
        # Streams and decompressors raise anything.
        yield lost(f"from byte {place} on the tar cannot be read: {error}.")


def _is_leftover(name: str) -> bool:
    """Whether it is one of the files that macOS writes beside others."""
    file = name.rpartition("/")[2]
    return file.startswith("._") or file == ".DS_Store"


class _Header(tarfile.TarInfo):
    """A header that tells its tar what stood where it should be; what is none is passed over, block by block."""

    @classmethod
    def fromtarfile(cls, tar: Any) -> _Header:
        place = tar.fileobj.tell()
        try:
            header = super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            tar.saw_zeros(place)
            raise
        except (tarfile.EmptyHeaderError, tarfile.TruncatedHeaderError) as error:  # type: ignore[attr-defined]
            tar.saw_end(place, tar.fileobj.tell(), str(error))
            raise
        except (tarfile.HeaderError, ValueError, ArithmeticError, LookupError) as error:
            tar.saw_damage(place, str(error))
            raise tarfile.InvalidHeaderError(str(error)) from error  # type: ignore[attr-defined]
        tar.saw_header(place)
        return header


class _Tar(tarfile.TarFile):
    """A tar that is read past what is broken in it, and keeps an account of that."""

    tarinfo = _Header
    members: list[tarfile.TarInfo]

    def __init__(self, *args: Any, **options: Any):
        self._losses: list[str] = []
        self._zeros: int | None = None
        self._damage: tuple[int, str] | None = None
        super().__init__(*args, **options)

    def losses(self) -> list[str]:
        """What could not be read since it was asked last, a sentence each."""
        told, self._losses = self._losses, []
        return told

    def saw_zeros(self, place: int) -> None:
        self._zeros = place if self._zeros is None else self._zeros

    def saw_damage(self, place: int, why: str) -> None:
        self._damage = self._damage or (place if self._zeros is None else self._zeros, why)
        self._zeros = None

    def saw_header(self, place: int) -> None:
        """After an end mark another tar may follow; zeros in any other place were files."""
        if self._damage is None and self._zeros is not None and place != _end_of_mark(self._zeros):
            self._damage = (self._zeros, "zeros instead of files")
        self._close(f"bytes {{}} to {place} of")

    def saw_end(self, place: int, end: int, why: str) -> None:
        marked = self._zeros is not None and (end == _end_of_mark(self._zeros) or end - self._zeros <= 1024)
        if self._damage is None and not marked:
            zeros = self._zeros
            self._damage = (place, f"it ends without its end mark ({why})") if zeros is None else (zeros, "zeros")
        self._close("from byte {} on")

    def _close(self, where: str) -> None:
        if self._damage is not None:
            start, why = self._damage
            self._losses.append(f"{where.format(start)} the tar cannot be read: {why}.")
        self._damage = self._zeros = None


def _end_of_mark(start: int) -> int:
    """Where an end mark that starts there ends: two blocks of zeros, and more up to a whole record."""
    return -(-(start + 1024) // RECORD) * RECORD
