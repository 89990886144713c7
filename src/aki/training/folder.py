"""The folder of a run: who may write into it, what it was begun with, and whether it is finished."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from aki.files import checksum, write_json
from aki.models.adapters import has_model
from aki.training.checkpoint import (
    DamagedError,
    Sealed,
    check_sealed,
    has_whole_checkpoint,
    last_whole_checkpoint,
    sealed,
)
from aki.training.data_files import data_files
from aki.training.recipe import Recipe, beyond_defaults

logger = logging.getLogger(__name__)

RESULT = "result.json"
_WEIGHTS = ("*.safetensors", "*.bin")
_PROCESSOR = "processor_config.json"
_DEFAULT = "its default"
"""What a recorded recipe does not say."""

Found = TypeVar("Found")


class RunError(ValueError):
    """A run that cannot start as asked."""


@dataclass(frozen=True)
class Begun:
    """What there is of a run.

    Attributes:
        result: of one that is finished.
        checkpoint: to go on from; None is the start.
    """

    result: dict[str, Any] | None = None
    checkpoint: Path | None = None


def first_process(act: Callable[[], Found]) -> Found:
    """Act in the first of a run's processes; all get what it returns, or what it raises."""
    found: list[Any] = [None, None]
    if PartialState().is_main_process:
        try:
            found[0] = act()
        except Exception as error:
            found[1] = error
    broadcast_object_list(found)
    if found[1] is not None:
        raise found[1]
    return found[0]


def training_folder(output: Path) -> Path:
    """Where a run's checkpoints and logs lie."""
    return output / "training"


def begin(recipe: Recipe, stage: str, output: Path, start_from: Path | None, resume: bool) -> Begun:
    """Begin a run in a folder, or find what there is of it. A finished one that has more steps now is taken up again
    at its last checkpoint.

    Raises:
        RunError: it holds a run and `resume` is not set, or one of another recipe, start or data, or nothing of it can
            be used.
    """
    training, result = training_folder(output), output / RESULT
    if not result.exists() and not has_whole_checkpoint(training):
        # A run that failed before its first checkpoint has nothing to lose.
        write_json(training / "run.json", _inputs(recipe, stage, start_from))
        last_whole_checkpoint(training)  # clears what a kill left
        return Begun()
    if not resume:
        raise RunError(f"{output} already holds a run: pass --resume to continue it, or choose another --output.")
    more_steps = False
    if (training / "run.json").exists():
        now = _inputs(recipe, stage, start_from)
        then = now | json.loads((training / "run.json").read_text())
        more_steps = result.exists() and _has_more_steps(then, now)
        _check_inputs(output, then | ({"recipe": now["recipe"]} if more_steps else {}), now)
    try:
        return _extended(output, now) if more_steps else _what_is_left(output)
    except DamagedError as error:
        raise RunError(f"{error}. Choose another --output, or delete {output} to train it again.") from error


def _has_more_steps(then: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether that is all in which its recipe differs."""
    before, after = _differences(then["recipe"], now["recipe"]).get(f"{now['stage']}.steps", (0, 0))
    alone = len(_differences(then["recipe"], now["recipe"])) == 1
    return alone and isinstance(before, int) and isinstance(after, int) and before < after


def _extended(output: Path, now: dict[str, Any]) -> Begun:
    """
    Raises:
        RunError: it left no checkpoint.
        DamagedError: none that is whole.
    """
    training = training_folder(output)
    checkpoint = last_whole_checkpoint(training)
    if checkpoint is None:
        raise RunError(
            f"{output} holds a finished run without a checkpoint (its save_every was 0), which more steps cannot go on "
            "from: choose another --output, and start from its model with --start-from."
        )
    # A kill between the two leaves a run of the old steps, which goes on from this checkpoint to its end.
    (output / RESULT).unlink()
    write_json(training / "run.json", now)
    return Begun(checkpoint=checkpoint)


def _what_is_left(output: Path) -> Begun:
    """
    Raises:
        DamagedError: neither the model of a finished run is whole, nor is a checkpoint.
    """
    training = training_folder(output)
    if not (output / RESULT).exists():
        return Begun(checkpoint=last_whole_checkpoint(training))
    result = json.loads((output / RESULT).read_text())
    try:
        _check_model(output, result)
    except DamagedError as error:
        checkpoint = last_whole_checkpoint(training)
        if checkpoint is None:
            raise DamagedError(f"{error}, and there is no checkpoint to make it from") from error
        logger.warning("%s: it is made again, from %s.", error, checkpoint)
        return Begun(checkpoint=checkpoint)
    return Begun(result)


def check_finished(output: Path) -> None:
    """
    Raises:
        RunError: the folder holds a run that is not finished, or whose weights are not those that it ended with. A
            folder without a run is not asked.
    """
    if not (output / RESULT).exists():
        if (training_folder(output) / "run.json").exists():
            raise RunError(f"{output} holds a run that is not finished: go on with it first, with --resume.")
        return
    try:
        _check_model(output, json.loads((output / RESULT).read_text()))
    except DamagedError as error:
        raise RunError(
            f"{error}. Train it again, or delete {output / RESULT}, which tells of other weights."
        ) from error


def _check_model(output: Path, result: dict[str, Any]) -> None:
    """
    Raises:
        DamagedError: the model of a finished run is not there any more, or another.
    """
    check_sealed(output, result.get("weights", {}))
    if not any(_weights(output)):
        raise DamagedError(f"the weights in {output} are gone")
    if not has_model(output):
        raise DamagedError(f"{output / 'config.json'} is gone")
    if not (output / _PROCESSOR).exists():
        raise DamagedError(f"{output / _PROCESSOR} is gone")


def sealed_weights(folder: Path) -> Sealed:
    """What the weights in a model's folder are."""
    return sealed(folder, (path.name for path in _weights(folder)))


def relevant(recipe: Recipe, stage: str) -> dict[str, Any]:
    """What of the recipe decides this stage's result: all that is not as it is by default."""
    values = beyond_defaults(recipe)
    for name in ("report_to", "workers", "name", "cache", "root", "rows", "learning_rates"):
        values.pop(name, None)
    if stage == "pretrain":
        values.pop("sft", None)
    return values


def _inputs(recipe: Recipe, stage: str, start_from: Path | None) -> dict[str, Any]:
    """All that decides a run's result. Pictures are taken as they are."""
    return {
        "stage": stage,
        "recipe": relevant(recipe, stage),
        "start_from": start_from and str(start_from.resolve()),
        "start_weights": {path.name: checksum(path) for path in _weights(start_from)} if start_from else {},
        "data": data_files(recipe, recipe.stage(stage)),
    }


def _check_inputs(output: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    """
    Raises:
        RunError: the run in the folder was begun with something else.
    """
    if then["stage"] != now["stage"]:
        raise RunError(f"{output} holds {then['stage']}, not {now['stage']}: choose another --output, or delete it.")
    if differences := _differences(then["recipe"], now["recipe"]):
        told = [f"{key} was {before}, now it is {after}" for key, (before, after) in differences.items()]
        more = f"; and {len(told) - 3} more" if len(told) > 3 else ""
        raise RunError(
            f"{output} holds a run of another recipe: {'; '.join(told[:3])}{more}. Choose another --output, or delete "
            "it."
        )
    # A folder may have moved; and what a run started from may be gone when it is finished.
    same = "start_weights" if now["start_weights"] else "start_from"
    if then[same] != now[same]:
        raise RunError(
            f"{output} holds a run that started from {then['start_from'] or 'new weights'} as it was then, now it is "
            f"{now['start_from'] or 'new weights'}: choose another --output, or delete it."
        )
    changed = [name for name, what in now["data"].items() if then["data"].get(name, what) != what]
    if changed:
        raise RunError(
            f"{output} holds a run over other data: {', '.join(changed[:3])} changed since it began. Put them back as "
            "they were, or choose another --output."
        )


def _differences(then: Any, now: Any, where: str = "") -> dict[str, tuple[Any, Any]]:
    """The dotted keys in which two recorded recipes differ, and what they are in both."""
    if isinstance(then, dict) and isinstance(now, dict):
        found: dict[str, tuple[Any, Any]] = {}
        for key in [*then, *(key for key in now if key not in then)]:
            below = f"{where}.{key}" if where else key
            found |= _differences(then.get(key, _DEFAULT), now.get(key, _DEFAULT), below)
        return found
    return {} if then == now else {where: (then, now)}


def _weights(folder: Path) -> Iterator[Path]:
    for pattern in _WEIGHTS:
        yield from folder.glob(pattern)
