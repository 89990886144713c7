"""A blank item of each kind of media that a batch lacks, so that all parts of a model take part in each of its steps.

Processes that train together, or hold a shard of the model each, meet in every part: one whose batch has no picture,
and so runs no encoder, would leave the others waiting.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import Cache

from aki.layout import AUDIO, VIDEO
from aki.models.media import Media

_STEPS_A_POSITION = 2
"""Steps of mel features for one position of an audio encoder (Whisper's and Voxtral's second convolution)."""


def with_blanks(model: Any, given: dict[str, Tensor], cache: Cache | None) -> dict[str, Tensor]:
    """What is given, and a blank item of every other kind that has to take part, in the order of `config.media`.

    Always in that order, because sharded encoders meet in the order in which they run.

    Args:
        model: AKI's backbone.
        given: inputs to forward, by their names in `config.media`.
        cache: behind cached tokens media are seen already, by all processes.
    """
    media = model.config.media
    lacking = [name for name in media if name not in given and _takes_part(model, media[name])]
    if lacking and cache is not None and int(cache.get_seq_length()) > 0:
        return given
    filled = given | {name: _blank(media[name], model.device) for name in lacking}
    return {name: filled[name] for name in (*media, *given) if name in filled}


def _takes_part(model: Any, media: Media) -> bool:
    parameters = [p for part in (media.encoder, media.connector) for p in model.get_submodule(part).parameters()]
    learns = model.training and torch.is_grad_enabled() and any(p.requires_grad for p in parameters)
    return learns or any(map(_is_shard, parameters))


def _is_shard(parameter: nn.Parameter) -> bool:
    """Of FSDP2, or of DeepSpeed's third stage."""
    return isinstance(parameter, DTensor) or hasattr(parameter, "ds_id")


def _blank(media: Media, device: torch.device) -> Tensor:
    """(1, ...) zeros."""
    if media.modality == AUDIO:
        length = _STEPS_A_POSITION * media.num_features
        return torch.zeros(1, media.encoder_config.num_mel_bins, length, device=device)
    picture = (media.encoder_config.num_channels, *media.image_size)
    return torch.zeros(1, *((media.frames, *picture) if media.modality == VIDEO else picture), device=device)
