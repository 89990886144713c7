"""What `from_pretrained` of an AKI model refuses, before it makes a weight and after it has read all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForMultimodalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME

from aki.models.checkpoint_files import has_weights
from aki.models.configuration import AkiConfig
from aki.models.weights import check_all_taken, check_complete, check_files, check_finite, check_total


def check_before(kind: type[PreTrainedModel], name: Any, options: dict[str, Any]) -> None:
    """A folder's files against its configuration: sizes that nobody has would fill the memory before they are refused.

    Args:
        kind: the model's class.
        name: a folder; of a hub id nothing is here yet, and what is fetched is compared when it is read.
        options: of `from_pretrained`.

    Raises:
        ValueError: they do not fit.
    """
    elsewhere = any(options.get(option) for option in ("config", "subfolder", "variant", "state_dict", "gguf_file"))
    folder = Path(str(name))
    if elsewhere or options.get("ignore_mismatched_sizes") or not _is_whole(folder):
        return
    config = AkiConfig.from_pretrained(name)
    # Stored as integers of other shapes, which their quantiser knows.
    if getattr(config, "quantization_config", None) is None:
        with torch.device("meta"):
            check_files(folder, kind(config))


def check_family_before(name: Any, config: PreTrainedConfig) -> None:
    """As `check_before`, for a model of another family.

    Raises:
        ValueError: it is far larger than its weights.
    """
    folder = Path(str(name))
    if _is_whole(folder) and getattr(config, "quantization_config", None) is None:
        with torch.device("meta"):
            check_total(folder, AutoModelForMultimodalLM.from_config(config))


def _is_whole(folder: Path) -> bool:
    """An adapter's folder has neither."""
    return (folder / CONFIG_NAME).is_file() and has_weights(folder)


def check_loaded(name: Any, model: PreTrainedModel, info: dict[str, Any]) -> None:
    """
    Args:
        info: transformers' `loading_info`.

    Raises:
        ValueError: weights are missing, of no use, or not numbers.
    """
    check_complete(name, info["missing_keys"])
    check_all_taken(name, info["unexpected_keys"])
    check_finite(name, dict(model.named_parameters()))
