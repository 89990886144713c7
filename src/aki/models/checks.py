"""What a model refuses: inputs that do not fit, and encoders that want more than it gives."""

from __future__ import annotations

import inspect

from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.utils import torch_compilable_check

from aki.attention import Rule
from aki.layout import AUDIO, VIDEO
from aki.models.media import Media


def check_behind_cache(
    rule: Rule, length: int, position_ids: Tensor | None, blocks: Tensor | None, cache: Cache | None
) -> None:
    """A rule that numbers tokens, or opens text, has to know what is cached.

    Args:
        blocks: (batch, length), or with those of cached tokens before them.
    """
    if cache is None or not (rule.positions is not None or (rule.changes_text and length > 1)):
        return
    seen = int(cache.get_seq_length())
    if seen == 0:
        return
    if rule.positions is not None and position_ids is None:
        raise ValueError(
            f"the rule {rule.name!r} numbers tokens in its own way, and what is cached does not tell how far it came: "
            "pass position_ids, the last of model.positions_by_rule(all input_ids so far)."
        )
    if not rule.changes_text or length == 1:
        return
    if blocks is None or blocks.shape[1] < seen + length:
        raise ValueError(
            f"the rule {rule.name!r} opens whole prompts, and what is cached does not tell whether a prompt ends "
            "there: pass the prompt_block_ids of all tokens so far, those in the cache included."
        )
    before, first = blocks[:, -length - 1], blocks[:, -length]
    if bool(((before == first) & (first >= 0)).any()):
        raise ValueError(
            f"the rule {rule.name!r} needs a prompt whole, and the cache ends in the middle of one: its tokens would "
            "not see these. Call the model with all of the prompt, or mark in prompt_block_ids where another begins."
        )


def check_size(name: str, media: Media, values: Tensor) -> None:
    """Audio encoders check the length themselves."""
    if media.modality == VIDEO and (values.ndim != 5 or values.shape[1] != media.frames):
        raise ValueError(
            f"{name} have the shape {tuple(values.shape)}, expected (videos, {media.frames}, channels, height, width): "
            f"give each video as many frames as config.video_frames."
        )
    if media.modality != AUDIO and tuple(values.shape[-2:]) != media.image_size:
        (height, width), expected = values.shape[-2:], media.image_size
        raise ValueError(
            f"{name} are {height} x {width}, the vision encoder takes {expected[0]} x {expected[1]}: "
            "give the image processor that size."
        )


def check_count(placeholders: Tensor, items: int, tokens_per_item: int, name: str) -> None:
    """
    Args:
        placeholders: how many there are, a tensor, which torch.export and torch.compile do not look into.
    """
    torch_compilable_check(
        placeholders == items * tokens_per_item,
        lambda: (
            f"{items} {name}(s) need {items * tokens_per_item} placeholders in input_ids ({tokens_per_item} for each "
            f"{name}), found {int(placeholders)}: pass the {name}s that the prompt names, and let the processor write "
            "the placeholders."
        ),
    )


def check_takes_one_input(encoder: PreTrainedModel) -> None:
    required = [
        name
        for name, parameter in inspect.signature(encoder.forward).parameters.items()
        if parameter.default is inspect.Parameter.empty
        and parameter.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        and name != encoder.main_input_name
    ]
    if required:
        raise ValueError(
            f"the encoder {encoder.config.model_type!r} wants more than {encoder.main_input_name} "
            f"({', '.join(required)}): AKI takes fixed-resolution encoders "
            "(SigLIP, SigLIP 2 fixed, CLIP, DINOv2, ResNet), not NaFlex ones."
        )
