"""Folders that hold an adapter (LoRA and its like), which is no model without the one that it was trained on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from aki.attention.recorded import FIELD

_ADAPTER = "adapter_config.json"


def adapter_of(folder: str | Path) -> str | None:
    """The model that the adapter in a folder belongs to; None where there is no adapter, or a model beside it."""
    if not (Path(folder) / _ADAPTER).is_file() or (Path(folder) / "config.json").exists():
        return None
    try:
        return str(json.loads((Path(folder) / _ADAPTER).read_text()).get("base_model_name_or_path"))
    except (ValueError, AttributeError):
        return "a model that it does not name"


def has_model(folder: str | Path) -> bool:
    """Whether a folder holds a model, or an adapter, which names one."""
    return (Path(folder) / "config.json").exists() or (Path(folder) / _ADAPTER).is_file()


def rule_of_adapter(folder: str | Path) -> str | None:
    """The attention rule that an adapter was trained under, where its folder names one."""
    file = Path(folder) / _ADAPTER
    return (json.loads(file.read_text()).get("auto_mapping") or {}).get(FIELD) if file.is_file() else None


@contextmanager
def model_of_adapter(folder: str | Path) -> Iterator[None]:
    """Say what a folder lacks, where transformers speaks of the internet.

    Raises:
        ValueError: there is an adapter in the folder and its model cannot be loaded, or no model at all, or no folder.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        base = adapter_of(folder)
        if base is None:
            if Path(folder).is_dir() and not (Path(folder) / "config.json").exists():
                raise ValueError(f"{folder} holds no model: there is no config.json in it.") from error
            if not Path(folder).exists():
                raise ValueError(
                    f"there is no folder {folder}, and no model of this name could be fetched from the hub: {error}"
                ) from error
            raise
        raise ValueError(
            f"{folder} holds an adapter alone, and its model, {base}, is not there: merge the two (merge_and_unload of "
            "peft), save model and processor in one folder, and name that."
        ) from error
