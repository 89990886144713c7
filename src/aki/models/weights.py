"""What is looked at before a folder's weights are read, and after: sizes that nobody has, numbers that are none."""

from __future__ import annotations

import re
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aki.models.checkpoint_files import CheckpointError, read_headers

MOST_LAYERS = 1000
"""Of one part; the deepest known models have 126."""
_LAYERS = re.compile(r"(^|_)(layers?|depths?|blocks)$")
_MOST = {
    r"height|width|shortest_edge|longest_edge": 8_192,
    r".*seq_length|.*frames|feature_size|n_fft|chunk_length": 100_000,
    "sampling_rate": 1_000_000,
}
"""What a processor's numbers are at most, in pixels, tokens, frames, mel bands, samples, seconds and hertz."""
_SHOWN = 10


def check_depth(config: dict[str, Any], name: Any) -> None:
    """Refuse a configuration that asks for more layers than any model has: building them would never end.

    Args:
        config: a config.json, with those of its parts.
        name: of its folder or hub id, for the message.

    Raises:
        ValueError: naming the field.
    """
    for field, value in _numbers(config, ""):
        if value > MOST_LAYERS and _LAYERS.search(field.rpartition(".")[2]):
            raise ValueError(
                f"the config.json of {name} asks for {value:,} layers ({field}): no model has more than "
                f"{MOST_LAYERS:,}, the file is broken or means harm."
            )


def check_sizes(config: dict[str, Any], name: Any) -> None:
    """Refuse a processor that makes gigabytes of a small picture, clip or prompt.

    Args:
        config: a processor_config.json, with those of its parts.
        name: of its folder or hub id, for the message.

    Raises:
        ValueError: naming the field.
    """
    for field, value in _numbers(config, ""):
        for pattern, most in _MOST.items():
            if value > most and re.fullmatch(pattern, field.rpartition(".")[2]):
                raise ValueError(
                    f"the processor of {name} asks for {value:,} ({field}): nothing needs more than {most:,}, its "
                    "configuration is broken or means harm."
                )


def check_total(folder: Path, model: nn.Module) -> None:
    """Refuse a model of any family that is far larger than a folder's weights, before any of it is made.

    Names are not compared, because families rename theirs when they load.

    Args:
        model: on the meta device.

    Raises:
        CheckpointError: a file is missing or broken, or there are less than half of the numbers.
    """
    wanted = sum(parameter.numel() for parameter in model.parameters())
    held = sum(prod(shape) for shape, _ in read_headers(folder).values())
    if wanted > 2 * held:
        raise CheckpointError(
            f"the config.json in {folder} describes {wanted:,} parameters, and its weights are {held:,} numbers: they "
            "do not belong together."
        )


def check_files(folder: Path, model: nn.Module) -> None:
    """Compare what a folder's weights are with what a model takes, before any of them is read or made.

    Args:
        model: on the meta device.

    Raises:
        CheckpointError: a file is missing or broken, or tensors have another shape, or are integers where the model has
            floating point.
    """
    wanted, problems = model.state_dict(), []
    for tensor, (shape, dtype) in read_headers(folder).items():
        if tensor not in wanted:
            continue
        if shape != tuple(wanted[tensor].shape):
            problems.append(f"{tensor} is {list(shape)} instead of {list(wanted[tensor].shape)}")
        elif wanted[tensor].is_floating_point() and re.fullmatch(r"[IU]\d+|BOOL", dtype):
            problems.append(f"{tensor} is {dtype} instead of floating point")
    if problems:
        raise CheckpointError(
            f"the weights in {folder} do not fit its config.json in {len(problems)} tensors: {_some(sorted(problems))}."
        )


def check_complete(name: Any, missing: set[str]) -> None:
    if missing:
        raise ValueError(
            f"the checkpoint {name} lacks {len(missing)} of the weights that its config.json describes, which would be "
            f"left random: {_some(sorted(missing))}."
        )


def check_all_taken(name: Any, unexpected: set[str]) -> None:
    if unexpected:
        raise ValueError(
            f"the checkpoint {name} holds {len(unexpected)} weights that no part of the model takes, so that it is not "
            f"the model that its config.json describes: {_some(sorted(unexpected))}."
        )


@torch.no_grad()
def check_finite(name: Any, tensors: dict[str, Tensor]) -> None:
    """
    Raises:
        ValueError: a tensor has a NaN or an infinite number; up to ten are named.
    """
    broken = sorted(tensor for tensor, values in tensors.items() if not _is_finite(values))
    if broken:
        raise ValueError(
            f"the checkpoint {name} has NaN or infinite numbers in {len(broken)} of its weights, with which every "
            f"answer is nonsense: {_some(broken)}."
        )


def _is_finite(values: Tensor) -> bool:
    """What lies on no device yet (on disk, for instance) is taken to be, and so is what is quantised."""
    if values.is_meta or not values.is_floating_point() or values.element_size() < 2 or not values.numel():
        return True
    # One pass, and no copy, unlike isfinite().all() over the whole.
    return bool(torch.stack(torch.aminmax(values.detach())).isfinite().all())


def _numbers(config: Any, at: str):
    """Dotted names and values of all whole numbers; of a list the largest, or its length."""
    if isinstance(config, dict):
        for name, value in config.items():
            yield from _numbers(value, f"{at}.{name}" if at else str(name))
    elif isinstance(config, list) and config and all(type(value) is int for value in config):
        yield at, max(*config, len(config))
    elif isinstance(config, list):
        for value in config:
            yield from _numbers(value, at)
    elif type(config) is int:
        yield at, config


def _some(lines: list[str]) -> str:
    return ", ".join(lines[:_SHOWN]) + (f" and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else "")
