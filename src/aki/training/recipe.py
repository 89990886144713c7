"""A recipe: typed dataclasses read from YAML, everything that decides a training run."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import product
from os.path import normpath
from pathlib import Path
from typing import Any

import yaml

from aki import recipes
from aki.attention import BACKENDS, get_rule
from aki.data.augment import Augment
from aki.data.orders import ORDERS
from aki.training.arguments import check_trainer

PARTS = ("vision_encoder", "connector", "language_model")
STAGES = ("pretrain", "sft")
MIXTURES = ("weights", "proportional", "uniform")
KINDS_OF_ADAPTERS: dict[str, dict[str, Any]] = {"lora": {}, "dora": {"use_dora": True}, "rslora": {"use_rslora": True}}
"""Kind -> what makes it one in PEFT's LoraConfig."""


@dataclass
class BackbonesRecipe:
    """Hub ids or folders of trained parts: the vision encoder, and the language model with its tokenizer."""

    vision: str
    text: str


@dataclass
class ModelRecipe:
    """A trained model, or the parts of a new one, each as its transformers configuration: `model_type` and the sizes
    that differ from its defaults.

    Attributes:
        pretrained: a folder or hub id of any multimodal model that `aki.unlock` takes, or of AKI's own; it has its
            sizes, its processor and its chat template. None makes a new model of the sizes.
        from_backbones: where trained parts come from; None starts from random weights of those sizes. The sizes above
            must be theirs: what a run needs is known before anything is downloaded.
    """

    vision: dict[str, Any] = field(default_factory=dict)
    text: dict[str, Any] = field(default_factory=dict)
    connector: dict[str, Any] = field(default_factory=dict)
    from_backbones: BackbonesRecipe | None = None
    pretrained: str | None = None

    def __post_init__(self) -> None:
        if self.pretrained is None:
            for part in ("vision", "text", "connector"):
                if not getattr(self, part):
                    raise RecipeError(f"the key 'model.{part}' is missing: name its sizes, or model.pretrained.")
        elif self.from_backbones is not None or self.vision or self.text or self.connector:
            raise RecipeError("model.pretrained is a whole model, with sizes of its own: leave the other keys out.")


@dataclass
class AdapterRecipe:
    """What is trained of a model whose own weights stay, by PEFT.

    Attributes:
        kind: lora, dora or rslora.
        r, alpha, dropout: rank, scale and dropout of the low-rank matrices.
        target_modules: names of the layers that get them; those of the language model's linear layers if absent.
        modules_to_save: names of modules that are trained whole; `connector` is that of any family.
        options: other fields of PEFT's LoraConfig.
    """

    kind: str = "lora"
    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _one_of("adapter.kind", self.kind, tuple(KINDS_OF_ADAPTERS))
        if self.r < 1:
            raise RecipeError(f"adapter.r must be at least 1, it is {self.r}.")


@dataclass
class QuantizationRecipe:
    """Weights of the language model in fewer bits, by bitsandbytes; an adapter is trained over them.

    Attributes:
        bits: 4 (NF4) or 8.
    """

    bits: int = 4

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise RecipeError(f"quantization.bits is 4 or 8, it is {self.bits}.")


@dataclass
class SourceRecipe:
    """A data set of chats, read by one of `aki.data.sources`.

    Attributes:
        kind: which reader, as `vqav2`.
        annotations: its files as released, in the reader's order, or the folder that they lie in.
        images: the folder of its pictures, or several.
        weight: how often it is drawn, relative to the other sources of the stage.
        name: what counts and messages call it; the kind if absent.
        augment: changes of the pictures; none if absent.
        options: what the kind takes beyond that.
    """

    kind: str
    annotations: tuple[str, ...]
    images: tuple[str, ...] = ()
    weight: float = 1.0
    name: str | None = None
    augment: Augment | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class DataRecipe:
    """DigitScenes, and the questions that models are measured on.

    Attributes:
        grid: digits a side.
        eval_size: at most so many held-out questions for validation: learning curves and the choice of a learning rate.
        test_size: at most so many others for the final numbers.
        held_out: sources of these questions, in shares of their weights. If absent they are DigitScenes' own, of a
            stage that trains on DigitScenes.
    """

    grid: int = 3
    eval_size: int = 600
    test_size: int = 3000
    held_out: tuple[SourceRecipe, ...] = ()

    def __post_init__(self) -> None:
        for name in ("eval_size", "test_size"):
            if getattr(self, name) < 1:
                raise RecipeError(f"data.{name} must be at least 1, it is {getattr(self, name)}.")


@dataclass
class ShardsRecipe:
    """Captioned pictures in webdataset tars.

    Attributes:
        kind: how a caption is written: kale, ocr or grounding (`aki.data.shards`).
        urls: paths, brace ranges (`{000..099}.tar`), or any URL that webdataset opens.
        weight: how often it is drawn, relative to the other shards of the stage.
        name: what counts and messages call it; the kind if absent.
    """

    kind: str
    urls: tuple[str, ...]
    weight: float = 1.0
    name: str | None = None


@dataclass
class StageRecipe:
    """One stage of training, on DigitScenes unless it names `sources` or `shards`.

    Attributes:
        task: `caption` (all of the text is learned) or `question` (the answer is learned).
        rule: the attention rule, a name in `aki.attention.RULES`, or several joined by `+`.
        order: `image_first`, `text_first`, `echo` (the question before the picture and after it), or `both`: each
            sample image first and text first, in one step.
        seen: of a caption, the largest share that may be drawn as prompt, which the picture sees and nobody learns; the
            rest is learned. 0 learns all of it.
        also_causal: each sample a second time in the same step, causally and with all of its text learned.
        steps, batch_size: optimizer steps, samples a step on each device.
        learning_rate, min_learning_rate, warmup_steps: a cosine from one to the other after a linear warm-up.
        adam_beta2: AdamW's second decay; short runs want it lower.
        frozen: parts that are not trained: vision_encoder, connector, language_model.
        max_length: tokens a sample may have.
        packing: fill rows of up to `row_tokens` tokens with whole samples; `batch_size` then counts rows.
        log_every, eval_every, save_every: in steps; 0 is never.
        sources, shards: the data, one or the other.
        mixture: how often each is drawn: by its `weights`, `proportional` to its size (sources), or all `uniform`.
        max_bad_share: the share of samples that may be unusable before the run ends.
    """

    task: str
    rule: str
    steps: int
    batch_size: int
    learning_rate: float
    min_learning_rate: float
    warmup_steps: int
    weight_decay: float
    order: str = "image_first"
    seen: float = 0.0
    also_causal: bool = False
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
    sources: tuple[SourceRecipe, ...] = ()
    shards: tuple[ShardsRecipe, ...] = ()
    mixture: str = "weights"
    max_bad_share: float = 0.01

    def __post_init__(self) -> None:
        get_rule(self.rule)
        _one_of("mixture", self.mixture, MIXTURES)
        self._check_data()
        _one_of("task", self.task, ("caption", "question"))
        _one_of("order", self.order, tuple(ORDERS))
        self._check_seen()
        for part in self.frozen:
            _one_of("frozen", part, PARTS)
        for name in ("steps", "batch_size", "gradient_accumulation_steps", "max_length", "row_tokens"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name} must be at least 1, it is {getattr(self, name)}.")
        for name in ("log_every", "eval_every", "save_every", "warmup_steps", "min_learning_rate", "weight_decay"):
            if getattr(self, name) < 0:
                raise RecipeError(f"{name} cannot be negative, it is {getattr(self, name)}.")
        if self.packing and self.row_tokens < self.copies * self.max_length:
            times = "" if self.copies == 1 else f" {self.copies} times"
            raise RecipeError(
                f"a sample of up to max_length: {self.max_length} tokens must fit a packed row{times}, which has "
                f"row_tokens: {self.row_tokens}: raise row_tokens, or lower max_length."
            )
        if self.learning_rate <= 0:
            raise RecipeError(f"learning_rate must be positive, it is {self.learning_rate}.")
        if set(self.frozen) == set(PARTS):
            raise RecipeError("frozen names every part: there is nothing left to train.")

    @property
    def copies(self) -> int:
        """How often each sample is trained in a step."""
        return len(ORDERS[self.order]) * (2 if self.also_causal else 1)

    def _check_seen(self) -> None:
        if not 0 <= self.seen <= 1:
            raise RecipeError(f"seen is a share of a caption, from 0 to 1, it is {self.seen}.")
        if self.seen and (self.task != "caption" or self.order != "image_first"):
            raise RecipeError(
                "seen splits captions that follow their picture: set it to 0 for questions and other orders."
            )
        if self.also_causal and not self.seen:
            raise RecipeError("also_causal trains beside what is seen of a caption: set seen to more than 0.")

    def _check_data(self) -> None:
        if self.sources and self.shards:
            raise RecipeError("a stage reads either sources or shards: give the others a stage of their own.")
        if self.shards and self.mixture == "proportional":
            raise RecipeError("nobody knows how many samples shards hold before reading them: use weights or uniform.")
        if self.eval_every and self.task == "caption":
            raise RecipeError("eval_every measures answers, a stage that learns captions gives none: set it to 0.")
        for name in ("sources", "shards"):
            _check_weights(name, getattr(self, name))
        if not 0 <= self.max_bad_share <= 1:
            raise RecipeError(f"max_bad_share is a share, from 0 to 1, it is {self.max_bad_share}.")


@dataclass
class Recipe:
    """A run: a model, its data, and one stage or both, each of which starts from the one before.

    Attributes:
        data: DigitScenes, for stages that name no data of their own, and the questions that models are measured on.
        root: the folder that relative paths of sources and shards are below.
        start_from: a folder with the model that the first stage starts from, instead of `model`.
        adapter: what is trained instead of the model's own weights; None trains those.
        quantization: of the weights below an adapter; None keeps them whole.
        trainer: any other field of transformers' TrainingArguments, for both stages.
        devices: processes that a step's samples are for. Fewer accumulate gradients, so that a step stays the same.
        fsdp: transformers' `fsdp_config`, to shard the model over processes; without it each holds all of it.
        seed: of weights, data and everything drawn.
        workers: processes that prepare batches, for each that trains.
        bf16: autocast to bfloat16.
        attention: what computes the language model's attention: auto, segments, sdpa or eager.
        cache: a folder for parsed annotations; that of the `datasets` library if absent.
        feature_cache: a folder for the features of a frozen vision encoder, for pictures that repeat over epochs.
        report_to: the Trainer's integrations: none, tensorboard, trackio, wandb, ...
        rows: what `aki compare` compares: name -> what differs from this recipe, nested as it is here, and perhaps a
            `title`.
        learning_rates: of SFT, which `aki compare` tries for each row first; empty keeps the recipe's.
    """

    name: str
    model: ModelRecipe
    data: DataRecipe = field(default_factory=DataRecipe)
    pretrain: StageRecipe | None = None
    sft: StageRecipe | None = None
    root: str = "."
    start_from: str | None = None
    adapter: AdapterRecipe | None = None
    quantization: QuantizationRecipe | None = None
    trainer: dict[str, Any] = field(default_factory=dict)
    devices: int = 1
    fsdp: dict[str, Any] | None = None
    seed: int = 0
    workers: int = 1
    bf16: bool = False
    attention: str = "auto"
    cache: str | None = None
    feature_cache: str | None = None
    report_to: tuple[str, ...] = field(default=("none",))
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    learning_rates: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        _one_of("attention", self.attention, (*BACKENDS, "sdpa", "eager"))
        if self.model.pretrained and self.start_from:
            raise RecipeError("model.pretrained and start_from both say what to start from: leave one out.")
        if self.quantization and not self.adapter:
            raise RecipeError("quantization keeps weights that cannot be trained: add an adapter, which is.")
        check_trainer(self.trainer)
        stages = [self.stage(name) for name in self.stages]
        if not stages:
            raise RecipeError(f"a recipe has at least one stage: {' or '.join(STAGES)}.")
        for name, least in (("devices", 1), ("workers", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise RecipeError(f"{name} must be at least {least}, it is {getattr(self, name)}.")
        if self.feature_cache and any("vision_encoder" not in stage.frozen for stage in stages):
            raise RecipeError(
                "feature_cache needs a vision_encoder that is frozen in every stage: its features change."
            )

        _check_weights("data.held_out", self.data.held_out)
        for name in self.stages:
            self._check_held_out(name, self.stage(name))

    def _check_held_out(self, name: str, stage: StageRecipe) -> None:
        if stage.eval_every and (stage.sources or stage.shards) and not self.data.held_out:
            raise RecipeError(
                f"{name}.eval_every measures held-out questions: name their sources in data.held_out, or set it to 0."
            )
        for asked, learned in product(self.data.held_out, stage.sources):
            shared = set(map(normpath, asked.annotations)) & set(map(normpath, learned.annotations))
            if shared and asked.options == learned.options:
                raise RecipeError(
                    f"data.held_out and {name}.sources both read {min(shared)}: a model would be asked what it has "
                    "learned; hold out a file of its own."
                )

    @property
    def stages(self) -> tuple[str, ...]:
        """The names of its stages, in order."""
        return tuple(name for name in STAGES if getattr(self, name) is not None)

    def stage(self, name: str) -> StageRecipe:
        """
        Raises:
            RecipeError: it has no such stage.
        """
        return getattr(self, _one_of("stage", name, self.stages))

    def accumulation(self, stage: StageRecipe, processes: int) -> int:
        """Batches that a process takes before each step, so that a step has the recipe's samples on so many processes.

        Raises:
            RecipeError: they cannot be dealt out evenly.
        """
        if processes < 1:
            raise RecipeError(f"processes must be at least 1, it is {processes}.")
        batches = stage.gradient_accumulation_steps * self.devices
        if batches % processes:
            raise RecipeError(
                f"a step has {batches} batches ({self.devices} devices x {stage.gradient_accumulation_steps}), which "
                f"{processes} processes cannot share evenly: start another number, or set devices."
            )
        return batches // processes

    def processes(self, available: int) -> int:
        """The most of the available processes that share every stage's steps evenly."""
        batches = [self.stage(name).gradient_accumulation_steps * self.devices for name in self.stages]
        return max(n for n in range(1, available + 1) if all(each % n == 0 for each in batches))


class RecipeError(ValueError):
    """A recipe that cannot be used as it stands."""


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe.

    Args:
        path: a YAML file, or the name of one of aki's own recipes.

    Raises:
        RecipeError: no such file, not YAML, an unknown key (the nearest one is named), a missing one, a wrong type.
    """
    path = recipes.path_of(path)
    try:
        values = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise RecipeError(f"there is no recipe at {path}, and aki's own are {', '.join(recipes.names())}.") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not YAML: {error}") from error
    try:
        return build(Recipe, values, "")
    except (RecipeError, ValueError) as error:
        raise RecipeError(f"{path}: {error}") from error


def beyond_defaults(value: Any) -> Any:
    """A dataclass as plain values for JSON or YAML, without the fields that are as they are by default."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        defaults = {f.name: f.default for f in dataclasses.fields(value)}
        defaults |= {f.name: f.default_factory() for f in dataclasses.fields(value) if callable(f.default_factory)}
        held = {name: getattr(value, name) for name in defaults}
        return {name: beyond_defaults(one) for name, one in held.items() if one != defaults[name]}
    if isinstance(value, dict):
        return {name: beyond_defaults(one) for name, one in value.items()}
    return [beyond_defaults(one) for one in value] if isinstance(value, list | tuple) else value


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
        return tuple(build(inner[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is tuple and inner[0] is str and isinstance(value, str):
        return (value,)
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


def _check_weights(name: str, data: Sequence[SourceRecipe | ShardsRecipe]) -> None:
    weights = [one.weight for one in data]
    if weights and not (all(0 <= weight < math.inf for weight in weights) and any(weights)):
        raise RecipeError(f"the weights of {name} are numbers from 0 on, not all zero; they are {weights}.")


def _join(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)


def _one_of(name: str, value: str, known: tuple[str, ...]) -> str:
    if value not in known:
        raise RecipeError(f"{name} {value!r} is not known; there are {', '.join(known)}.")
    return value
