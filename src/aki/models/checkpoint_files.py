"""The tensors of a checkpoint folder, in one file or in shards, read one at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_COPIED_AT_ONCE = 16 << 20
"""Bytes."""


class CheckpointError(ValueError):
    """A folder that does not hold what it should."""


class TensorFiles:
    """Names, shapes and dtypes of a folder's tensors. Files are mapped while one of their tensors is in use.

    Attributes:
        shapes: of each tensor.
        dtypes: of each tensor; all are floating point.
        largest: bytes of the largest file.

    Raises:
        CheckpointError: files are missing or broken, or tensors are not floating point.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._files: dict[str, Path] = {}
        paths = _paths(folder)
        self.largest = max(path.stat().st_size for path in paths)
        for path in paths:
            self._read_header(path)

    def read(self, name: str) -> Tensor:
        """One tensor."""
        with _open(self._files[name]) as file:
            return file.get_tensor(name)

    def copy_rows(self, name: str, out: Tensor) -> None:
        """The first `len(out)` rows of a tensor into `out`, a few at a time: never are all of both in memory."""
        row = max(out[:1].numel() * out.element_size(), 1)
        step = max(_COPIED_AT_ONCE // row, 1)
        for start in range(0, len(out), step):
            stop = min(start + step, len(out))
            with _open(self._files[name]) as file:
                out[start:stop] = file.get_slice(name)[start:stop]

    def _read_header(self, path: Path) -> None:
        with _open(path) as file:
            for name in file.keys():  # noqa: SIM118, it is no dict
                entry = file.get_slice(name)
                if entry.get_dtype() not in _DTYPES:
                    raise CheckpointError(
                        f"{name} in {path} has the dtype {entry.get_dtype()}: only floating point weights of "
                        f"{', '.join(_DTYPES)} are read, quantised ones are not."
                    )
                self._files[name] = path
                self.shapes[name] = tuple(entry.get_shape())
                self.dtypes[name] = _DTYPES[entry.get_dtype()]


def has_weights(folder: Path) -> bool:
    """Whether there is a file of weights by its usual name."""
    return any((folder / name).is_file() for name in (WEIGHTS, INDEX))


def read_headers(folder: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape, and dtype as safetensors writes it (F32, BF16, I8, ...), of each tensor of a folder.

    Raises:
        CheckpointError: files are missing or broken.
    """
    found = {}
    for path in _paths(folder):
        with _open(path) as file:
            for name in file.keys():  # noqa: SIM118, it is no dict
                entry = file.get_slice(name)
                found[name] = (tuple(entry.get_shape()), entry.get_dtype())
    return found


def read_json(path: Path, what: str) -> dict[str, Any]:
    """A JSON file that holds a dictionary.

    Raises:
        CheckpointError: it is not there, or broken; `what` ends the sentence.
    """
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}: {what}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is broken: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is broken: it holds no dictionary.")
    return found


def _paths(folder: Path) -> list[Path]:
    if not (folder / INDEX).is_file():
        if not (folder / WEIGHTS).is_file():
            raise CheckpointError(f"{folder} has no {WEIGHTS} and no {INDEX}.")
        return [folder / WEIGHTS]
    weight_map = read_json(folder / INDEX, "").get("weight_map", {})
    names = weight_map.values() if isinstance(weight_map, dict) else [weight_map]
    if not all(isinstance(name, str) and name == Path(name).name for name in names):
        raise CheckpointError(f"{folder / INDEX} is broken: its weight_map gives no file of the folder.")
    paths = [folder / name for name in sorted(set(names))]
    missing = [path.name for path in paths if not path.is_file()]
    if missing or not paths:
        raise CheckpointError(f"{folder} lacks weights that its {INDEX} names: {', '.join(missing) or 'all of them'}.")
    return paths


def _open(path: Path):
    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        raise CheckpointError(f"{path} is broken: {error}") from error
