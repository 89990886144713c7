"""A model to talk to, from a folder or a hub id."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from aki.attention import unlock as unlock_model
from aki.models import AkiConfig
from aki.models.adapters import model_of_adapter
from aki.models.other import described, load_any


def load(folder: str | Path, unlock: bool = False) -> tuple[Any, Any]:
    """Model and processor, on the GPU if there is one. Weights are read as safetensors only.

    Args:
        folder: of an AKI model, or of any other model of transformers that was unlocked when it was saved.
        unlock: lay MMA over a model that is not AKI's and was not unlocked before.

    Raises:
        ValueError: there is no such folder, or no whole model in it that could be asked about pictures.
    """
    local = Path(folder)
    looks_local = local.is_absolute() or str(folder).startswith(".") or len(local.parts) > 2
    if local.is_file() or (looks_local and not local.exists()):
        raise ValueError(f"there is no model folder at {folder}.")
    with _without_bars(), model_of_adapter(folder):
        return _loaded(folder, unlock)


def _loaded(folder: str | Path, unlock: bool) -> tuple[Any, Any]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = described(folder)
    kind = found.get("model_type")
    other = kind not in (AkiConfig.model_type, None)
    if other and not unlock and "attention_rule" not in found:
        raise ValueError(
            f"{folder} holds a model of type {kind!r}, not an AKI model: to lay MMA over it as it is, add --unlock."
        )
    model, processor = load_any(folder)
    model = model.to(device).eval()  # type: ignore[arg-type]
    return (unlock_model(model, processor) if other else model), processor


@contextmanager
def _without_bars() -> Iterator[None]:
    """An answer for a person or a script is no place for the bars of loading."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
