"""A recipe: typed dataclasses read from YAML, everything that decides a training run."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from aki.attention import BACKENDS, get_rule

PARTS = ("vision_encoder", "connector", "language_model")


@dataclass
class ModelRecipe:
    """The parts, each as its transformers configuration: `model_type` and the sizes that differ from its defaults."""

    vision: dict[str, Any]
    text: dict[str, Any]
    connector: dict[str, Any]


@dataclass
class DataRecipe:
    """DigitScenes.

    Attributes:
        grid: digits a side.
        eval_size: held-out questions that a learning curve's point is measured on.
        test_size: held-out questions that the final numbers are measured on.
    """

    grid: int = 3
    eval_size: int = 600
    test_size: int = 3000


@dataclass
class StageRecipe:
    """One stage of training.

    Attributes:
        task: `caption` (all of the text is learned) or `question` (the answer is learned).
        rule: the attention rule, a name in `aki.attention.RULES`.
        steps, batch_size: optimizer steps, samples a step on each device.
        learning_rate, min_learning_rate, warmup_steps: a cosine from one to the other after a linear warm-up.
        adam_beta2: AdamW's second decay; short runs want it lower.
        frozen: parts that are not trained: vision_encoder, connector, language_model.
        max_length: tokens a sample may have.
        packing: fill rows of up to `row_tokens` tokens with whole samples; `batch_size` then counts rows.
        log_every, eval_every, save_every: in steps; 0 is never.
    """

    task: str
    rule: str
    steps: int
    batch_size: int
    learning_rate: float
    min_learning_rate: float
    warmup_steps: int
    weight_decay: float
    adam_beta2: float = 0.999
    clip: float = 1.0
    gradient_accumulation_steps: int = 1
    frozen: tuple[str, ...] = ()
    max_length: int = 512
    packing: bool = False
    row_tokens: int = 2048
    log_every: int = 10
    eval_every: int = 0
    save_every: int = 500

    def __post_init__(self) -> None:
        get_rule(self.rule)
        _one_of("task", self.task, ("caption", "question"))
        for part in self.frozen:
            _one_of("frozen", part, PARTS)
        for name in ("steps", "batch_size", "gradient_accumulation_steps", "max_length", "row_tokens"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name} must be at least 1, it is {getattr(self, name)}.")
        for name in ("log_every", "eval_every", "save_every", "warmup_steps", "min_learning_rate", "weight_decay"):
            if getattr(self, name) < 0:
                raise RecipeError(f"{name} cannot be negative, it is {getattr(self, name)}.")
        if self.learning_rate <= 0:
            raise RecipeError(f"learning_rate must be positive, it is {self.learning_rate}.")
        if set(self.frozen) == set(PARTS):
            raise RecipeError("frozen names every part: there is nothing left to train.")


@dataclass
class Recipe:
    """A run: a model, its data, and the stages, each of which starts from the one before.

    Attributes:
        seed: of weights, data and everything drawn.
        workers: processes that prepare batches.
        bf16: autocast to bfloat16.
        attention: what computes the language model's attention: auto, merged, flex, sdpa or eager.
        feature_cache: a folder for the features of a frozen vision encoder, for pictures that repeat over epochs.
        report_to: the Trainer's integrations: none, tensorboard, trackio, wandb, ...
    """

    name: str
    model: ModelRecipe
    data: DataRecipe
    pretrain: StageRecipe
    sft: StageRecipe
    seed: int = 0
    workers: int = 1
    bf16: bool = False
    attention: str = "auto"
    feature_cache: str | None = None
    report_to: tuple[str, ...] = field(default=("none",))

    def __post_init__(self) -> None:
        _one_of("attention", self.attention, (*BACKENDS, "sdpa", "eager"))
        if self.feature_cache and any("vision_encoder" not in stage.frozen for stage in (self.pretrain, self.sft)):
            raise RecipeError(
                "feature_cache needs a vision_encoder that is frozen in both stages: its features change."
            )

    def stage(self, name: str) -> StageRecipe:
        return getattr(self, _one_of("stage", name, STAGES))


STAGES = ("pretrain", "sft")


class RecipeError(ValueError):
    """A recipe that cannot be used as it stands."""


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe.

    Raises:
        RecipeError: no such file, not YAML, an unknown key (the nearest one is named), a missing one, a wrong type.
    """
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise RecipeError(f"there is no recipe at {path}.") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not YAML: {error}") from error
    try:
        return build(Recipe, values, "")
    except (RecipeError, ValueError) as error:
        raise RecipeError(f"{path}: {error}") from error


def build(kind: Any, value: Any, where: str) -> Any:
    """A value read from YAML as the annotated type.

    Args:
        where: the dotted name of the field, for messages.
    """
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _build_dataclass(kind, value, where)
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in inner:
            return None
        return build(next(option for option in inner if option is not type(None)), value, where)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(build(inner[0], item, where) for item in value)
    if origin is dict and isinstance(value, dict):
        return value
    # YAML reads 1e-3 as text.
    if kind is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    if isinstance(kind, type) and isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise RecipeError(f"{where} should be {getattr(kind, '__name__', kind)}, it is {value!r}.")


def _build_dataclass(kind: type, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise RecipeError(f"{where or 'a recipe'} should be a mapping of fields, it is {value!r}.")
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key in value:
        if key not in fields:
            near = get_close_matches(str(key), fields, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(fields)}."
            raise RecipeError(f"unknown key {_join(where, key)!r}: {hint}")
    for name, spec in fields.items():
        if name not in value and spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
            raise RecipeError(f"the key {_join(where, name)!r} is missing.")
    return kind(**{key: build(hints[key], item, _join(where, key)) for key, item in value.items()})


def known(kind: str, name: str, names: Iterable[str], where: str) -> str:
    """The name, if it is among those.

    Raises:
        RecipeError: it is not; the nearest is named.
    """
    names = list(names)
    if name not in names:
        near = get_close_matches(name, names, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise RecipeError(f"unknown {kind} {name!r} in {where}.{hint}")
    return name


def _join(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)


def _one_of(name: str, value: str, known: tuple[str, ...]) -> str:
    if value not in known:
        raise RecipeError(f"{name} {value!r} is not known; there are {', '.join(known)}.")
    return value
