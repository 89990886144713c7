"""What a stage's data files are, so that a run is not gone on with over others."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlparse

import xxhash
from webdataset.shardlists import expand_urls

from aki.data.sources import SOURCES
from aki.files import checksum
from aki.training.data import below
from aki.training.recipe import Recipe, SourceRecipe, StageRecipe

_TABLES = {".json", ".jsonl", ".csv", ".parquet", ".arrow"}
_BLOCKS, _BLOCK = 16, 1 << 16
"""How many blocks of a shard are read, and the bytes of each."""


def data_files(recipe: Recipe, stage: StageRecipe) -> dict[str, str]:
    """The annotations and shards that a stage reads, as the recipe names them -> what is in them.

    Annotations count whole; of a shard its size and some blocks, of a folder its tables and every file's name and size.
    Pictures, and what lies on the network, do not count, nor does what is not there.
    """
    sources = (*stage.sources, *(recipe.data.held_out if stage.task == "question" else ()))
    found = {
        path: _annotations(Path(below(recipe.root, path))) for source in sources for path in _named(recipe, source)
    }
    for url in (url for shards in stage.shards for pattern in shards.urls for url in expand_urls(pattern)):
        place = urlparse(below(recipe.root, url))
        found[url] = _some_blocks(Path(place.path)) if place.scheme in ("", "file") else None
    return {name: value for name, value in found.items() if value is not None}


def _named(recipe: Recipe, source: SourceRecipe) -> Iterator[str]:
    """A source's annotation files; a folder of a kind that knows its files by name is those."""
    names = getattr(SOURCES.get(source.kind), "FILES", ())
    for path in source.annotations:
        if names and Path(below(recipe.root, path)).is_dir():
            yield from (os.path.join(path, name) for name in names)
        else:
            yield path


def _annotations(path: Path) -> str | None:
    if path.is_file():
        return checksum(path)
    if not path.is_dir():
        return None
    digest = xxhash.xxh3_128()
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        digest.update(f"{file.relative_to(path)}\0{file.stat().st_size}\0".encode(errors="surrogateescape"))
        if file.suffix.lower() in _TABLES:
            digest.update(checksum(file).encode())
    return digest.hexdigest()


def _some_blocks(path: Path) -> str | None:
    if not path.is_file():
        return None
    size, digest = path.stat().st_size, xxhash.xxh3_128()
    with path.open("rb") as file:
        for number in range(_BLOCKS):
            file.seek(max(size - _BLOCK, 0) * number // (_BLOCKS - 1))
            digest.update(file.read(_BLOCK))
    return f"{size} {digest.hexdigest()}"
