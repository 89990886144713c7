"""Shards that are damaged in every way: a part of the campaign. Each sample is used, or counted with its place."""

from __future__ import annotations

import io
import random
import re
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

from aki.data.report import BadSample
from aki.data.shards import ShardReader, open_shards

FAULTS = ("bit", "bits", "zeros", "noise", "cut", "gone", "twice", "two tars", "links", "empty file", "dots")
SAMPLES = 20
_PLACE = re.compile(r"bytes (\d+) to (\d+) of|from byte (\d+) on")


def run(seed: int, tries: int) -> tuple[int, list[str]]:
    """
    Returns:
        The tries, and a sentence for each shard that lost a sample without a count, or ended in an error.
    """
    draw, failures = random.Random(seed), []
    with TemporaryDirectory() as place:
        path = Path(place) / "shard.tar"
        for number in range(tries):
            fault = draw.choice(FAULTS)
            try:
                put_in = _write(path, draw, fault)
                lost = _lost(path, put_in, *_read(path), shift=6000 if fault in ("gone", "twice") else 0)
            except Exception as error:
                # A reader may raise nothing, so that whatever it raises is a failure.
                lost = [f"{type(error).__name__}: {error}"]
            if lost:
                failures.append(f"shard {number}, {fault}: {lost[0]}, and {len(lost) - 1} more")
    return tries, failures


def _write(path: Path, draw: random.Random, fault: str) -> dict[str, list[tuple[int, int]]]:
    """A shard with its fault. Returns, by name, the bytes that each sample that was put in had before."""
    name = "photo.{:06}" if fault == "dots" else "{:06}"
    names = [name.format(number) for number in range(SAMPLES)]
    links = {one for one in names if fault == "links" and draw.random() < 0.3}
    put_in = _tar(path, names, draw, links)
    data = bytearray(path.read_bytes())
    start = draw.randrange(max(last for spans in put_in.values() for _, last in spans))
    if fault in ("bit", "bits"):
        for _ in range(1 if fault == "bit" else 9):
            data[draw.randrange(len(data) - 10240)] ^= 1 << draw.randrange(8)
    elif fault in ("zeros", "noise"):
        width = draw.randrange(1, 6000)
        data[start : start + width] = bytes(width) if fault == "zeros" else draw.randbytes(width)
    elif fault == "cut":
        del data[start:]
    elif fault == "gone":
        del data[start : start + draw.randrange(1, 6000)]
    elif fault == "twice":
        data[start:start] = data[start : start + draw.randrange(1, 6000)]
    elif fault == "two tars":
        second = path.with_suffix(".second")
        _tar(second, [f"b{one}" for one in names], draw, set())
        put_in |= {f"b{one}": [] for one in names}
        data += second.read_bytes()
    elif fault == "empty file":
        data.clear()
    path.write_bytes(data)
    return put_in


def _tar(path: Path, names: list[str], draw: random.Random, links: set[str]) -> dict[str, list[tuple[int, int]]]:
    with tarfile.open(path, "w") as tar:
        for name in names:
            colour, file = draw.randbytes(3), io.BytesIO()
            Image.new("RGB", (32, 24), tuple(colour)).save(file, "PNG")
            for extension, content in (("png", file.getvalue()), ("txt", name.encode())):
                info = tarfile.TarInfo(f"{name}.{extension}")
                if name in links and extension == "png":
                    info.type, info.linkname = tarfile.SYMTYPE, "elsewhere.png"
                    tar.addfile(info)
                else:
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    spans: dict[str, list[tuple[int, int]]] = {name: [] for name in names}
    with tarfile.open(path) as tar:
        for info in tar:
            spans[info.name[:-4]].append((info.offset, info.offset_data + info.size))
    return spans


def _read(path: Path) -> tuple[set[str], list[BadSample]]:
    """One pass: the keys of the samples that can be used, and all that was counted."""
    shards = open_shards("kale", [str(path)])
    reader = ShardReader(shards, 0, 0, 1)
    used, counted = set[str](), list[BadSample]()
    for member in reader:
        if reader.place.turn:
            break
        try:
            if isinstance(member, BadSample):
                raise member
            used.add(shards.sample(member).id.partition("/")[2])
        except BadSample as bad:
            counted.append(bad)
        if len(used) + len(counted) > 10 * SAMPLES:
            raise RuntimeError("one pass has more samples than the shard")
    return used, counted


def _lost(
    path: Path, put_in: dict[str, list[tuple[int, int]]], used: set[str], counted: list[BadSample], shift: int
) -> list[str]:
    """The samples that are neither used, nor counted by name, nor in a place that a count names.

    Args:
        shift: bytes that may have gone or come, by which places differ from those that were written.
    """
    named = {bad.id.partition("/")[2] for bad in counted if bad.id != str(path)}
    places = [found for bad in counted if (found := _PLACE.search(bad.detail))]
    empty = any("holds no samples" in bad.detail for bad in counted)

    def in_a_place(spans: list[tuple[int, int]]) -> bool:
        ranges = [(int(p[1] or p[3]) - shift, int(p[2]) + shift if p[2] else float("inf")) for p in places]
        return any(first <= last_of and first_of <= last for first_of, last_of in spans for first, last in ranges)

    return [
        f"{name} is lost"
        for name, spans in put_in.items()
        if not (name in used or name in named or empty or in_a_place(spans))
    ]
