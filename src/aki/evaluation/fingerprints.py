"""Hashes of what a score depends on: the model's files and the data's rows."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

_WEIGHTS_AND_WORDS = (".safetensors", ".bin", ".json", ".jinja", ".model")
_WRITTEN_BY_US = {"results.json", "result.json", "trainer_state.json"}


def model_fingerprint(pretrained: str, commit: str | None = None) -> str:
    """Of a folder, the hash of its weights, configuration, tokenizer and template; of a hub id, its commit."""
    folder = Path(pretrained)
    if not folder.is_dir():
        return f"{pretrained}@{commit or 'unknown'}"
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in _WEIGHTS_AND_WORDS and file.name not in _WRITTEN_BY_US:
            digest.update(file.name.encode())
            with file.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:16]


def data_fingerprint(dataset: Any) -> str:
    """Of a split's rows, pictures as their encoded bytes: the same wherever the same data are loaded.

    Args:
        dataset: a `datasets.Dataset`.
    """
    import datasets

    digest = hashlib.sha256()
    for name, feature in dataset.features.items():
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(name, datasets.Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            dataset = dataset.cast_column(name, datasets.Sequence(datasets.Image(decode=False)))
    for row in dataset:
        _update(digest, row)
    return digest.hexdigest()[:16]


def _update(digest: Any, value: Any) -> None:
    if isinstance(value, dict):
        if value.get("bytes", b"") is None and value.get("path"):
            value = {"bytes": Path(value["path"]).read_bytes()}  # a picture that lies beside its table
        for name, part in sorted(value.items()):
            if name != "path":  # where a picture lay does not change it
                digest.update(name.encode())
                _update(digest, part)
    elif isinstance(value, list):
        digest.update(f"[{len(value)}".encode())
        for part in value:
            _update(digest, part)
    else:
        digest.update(value if isinstance(value, bytes) else repr(value).encode())
