"""Folders that were written before AKI had a backbone of its own: their weights have other names.

transformers renames them while it loads. What is saved has the model's own names, because a Trainer that resumes reads
them without renaming anything.
"""

from __future__ import annotations

from typing import Any

from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from aki.models.configuration import AkiConfig

_ENCODING = ("vision_encoder", "connector", "video_encoder", "video_connector", "audio_encoder", "audio_connector")
_DECODER = ("model", "transformer")
"""What language models call their decoder; the latter is GPT-2's way."""


class RenamedOnLoading(WeightRenaming):
    """Nothing is renamed back on saving."""

    __slots__ = ()

    def reverse_transform(self) -> WeightRenaming:
        return WeightRenaming(r"(?!)", "")  # no name has that


def register_names() -> None:
    """Tell transformers; the backbone and what stands on it have a list each, as transformers' own models do."""
    whole: list[Any] = [RenamedOnLoading(r"^language_model\.lm_head\.", "lm_head.")]
    whole += [RenamedOnLoading(rf"^language_model\.{name}\.", "model.language_model.") for name in _DECODER]
    whole += [RenamedOnLoading(rf"^{part}\.", f"model.{part}.") for part in _ENCODING]
    backbone: list[Any] = [RenamedOnLoading(rf"^language_model\.{name}\.", "language_model.") for name in _DECODER]
    register_checkpoint_conversion_mapping(AkiConfig.model_type, whole, overwrite=True)
    register_checkpoint_conversion_mapping("AkiModel", backbone, overwrite=True)
