"""What a folder must hold before it is read as a model."""

from __future__ import annotations

import json
from pathlib import Path


def check_model_folder(folder: str | Path) -> None:
    """Say what is wrong with a folder that holds no whole model, of which transformers says that the network is down.

    Args:
        folder: what is no folder of this machine is left to transformers.

    Raises:
        ValueError: an adapter without its model, or no configuration.
    """
    local = Path(folder)
    if not local.is_dir() or (local / "config.json").exists():
        return
    adapter = local / "adapter_config.json"
    if not adapter.exists():
        raise ValueError(f"{folder} holds no model: there is no config.json in it.")
    try:
        base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError):
        base = None
    raise ValueError(
        f"{folder} holds an adapter{f' of {base}' if base else ''} and not the model: merge them "
        "(PeftModel.from_pretrained(model, folder).merge_and_unload()) and save the result with its processor."
    )
