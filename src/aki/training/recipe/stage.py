"""What a recipe says of one stage."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from aki.attention import get_rule
from aki.data.orders import ORDERS
from aki.training.recipe.data import ShardsRecipe, SourceRecipe, check_weights
from aki.training.recipe.errors import RecipeError, one_of

PARTS = ("vision_encoder", "connector", "language_model")
MIXTURES = ("weights", "proportional", "uniform")


def recorded(default: Any) -> Any:
    """A field that is written down also where it is as by default, as when it had none: runs begun then go on."""
    return field(default=default, metadata={"recorded": True})


@dataclass
class StageRecipe:
    """One stage of training, on DigitScenes unless it names `sources` or `shards`.

    Attributes:
        rule: the attention rule, a name in `aki.attention.RULES`, or several joined by `+`.
        batch_size: samples a step on each device; packed rows where there is `packing`.
        learning_rate: the highest; a cosine leads down from it, after a linear warm-up.
        task: `caption` (all of the text is learned) or `question` (the answer is learned).
        steps: optimizer steps; or say `epochs`.
        epochs: instead of steps: so many times as many samples as the sources hold; they are still drawn by `mixture`.
        min_learning_rate: where warm-up begins and the cosine ends; absent it is the paper's share of `learning_rate`,
            a tenth in pre-training and a twentieth in SFT.
        warmup_steps: absent they are the paper's, 2000 in pre-training and 150 in SFT, and at most a tenth of steps.
        weight_decay: AdamW's, of all but the language model's input embeddings, norms and biases.
        order: `image_first`, `text_first`, `echo` (the question before the picture and after it), or `both`: each
            sample image first and text first, in one step.
        seen: of a caption, the largest share that may be drawn as prompt, which the picture sees and nobody learns; the
            rest is learned. 0 learns all of it.
        also_causal: each sample a second time in the same step, causally and with all of its text learned.
        adam_beta2: AdamW's second decay; short runs want it lower.
        clip: the largest norm of a step's gradient.
        gradient_accumulation_steps: batches that each device takes before a step.
        frozen: parts that are not trained: vision_encoder, connector, language_model.
        max_length: tokens a sample may have.
        packing: fill rows of up to `row_tokens` tokens with whole samples; `batch_size` then counts rows.
        row_tokens: tokens a packed row may have.
        padding_free: the samples of a batch one behind the other in one row, instead of a row each and padding.
        log_every: steps between two lines of the log; 0 is never.
        eval_every: steps between two scorings of held-out questions; 0 is never.
        save_every: steps between two checkpoints; 0 is never, and such a run can't be resumed or extended.
        patience: end after so many scorings in a row without a better held-out accuracy, and keep the best checkpoint's
            model; 0 trains all steps.
        sources: data sets of chats; or `shards`.
        shards: captioned pictures in webdataset tars; or `sources`.
        mixture: how often each is drawn: by its `weights`, `proportional` to its size (sources), or all `uniform`.
        max_bad_share: the share of samples that may be unusable before the run ends.
    """

    LOWEST_RATE: ClassVar[float] = 0.05
    WARM_UP: ClassVar[int] = 150

    rule: str
    batch_size: int
    learning_rate: float
    task: str = recorded("question")
    steps: int | None = recorded(None)
    epochs: float | None = None
    min_learning_rate: float | None = recorded(None)
    warmup_steps: int | None = recorded(None)
    weight_decay: float = recorded(1e-4)
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
    padding_free: bool = False
    log_every: int = 10
    eval_every: int = 0
    save_every: int = 500
    patience: int = 0
    sources: tuple[SourceRecipe, ...] = ()
    shards: tuple[ShardsRecipe, ...] = ()
    mixture: str = "weights"
    max_bad_share: float = 0.01

    @staticmethod
    def needs(values: Mapping[str, Any]) -> dict[str, str]:
        """Keys that are missing beside these, and what to do."""
        return {} if {"steps", "epochs"} & values.keys() else {"steps": "say how many, or epochs of the sources"}

    def __post_init__(self) -> None:
        get_rule(self.rule)
        one_of("mixture", self.mixture, MIXTURES)
        self._check_data()
        one_of("task", self.task, ("caption", "question"))
        one_of("order", self.order, tuple(ORDERS))
        self._check_seen()
        self._check_length()
        for part in self.frozen:
            one_of("frozen", part, PARTS)
        for name in ("batch_size", "gradient_accumulation_steps", "max_length", "row_tokens"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name} must be at least 1, it is {getattr(self, name)}.")
        for name in ("log_every", "eval_every", "save_every", "weight_decay", "warmup_steps", "min_learning_rate"):
            if (getattr(self, name) or 0) < 0:
                raise RecipeError(f"{name} cannot be negative, it is {getattr(self, name)}.")
        if self.packing and self.row_tokens < self.copies * self.max_length:
            times = "" if self.copies == 1 else f" {self.copies} times"
            raise RecipeError(
                f"a sample of up to max_length: {self.max_length} tokens must fit a packed row{times}, which has "
                f"row_tokens: {self.row_tokens}: raise row_tokens, or lower max_length."
            )
        if self.padding_free and self.packing:
            raise RecipeError("packing fills its rows already: take padding_free or packing.")
        if self.padding_free and not (self.sources or self.shards):
            raise RecipeError("padding_free needs sources or shards: the batches of DigitScenes keep their rows.")
        if self.learning_rate <= 0:
            raise RecipeError(f"learning_rate must be positive, it is {self.learning_rate}.")
        if set(self.frozen) == set(PARTS):
            raise RecipeError("frozen names every part: there is nothing left to train.")
        self._check_patience()

    @property
    def copies(self) -> int:
        """How often each sample is trained in a step."""
        return len(ORDERS[self.order]) * (2 if self.also_causal else 1)

    @property
    def joined(self) -> bool:
        """Whether several samples share a row."""
        return self.packing or self.padding_free

    @property
    def lowest_rate(self) -> float:
        """The learning rate at which the stage begins and ends."""
        return self.LOWEST_RATE * self.learning_rate if self.min_learning_rate is None else self.min_learning_rate

    @property
    def warm_up(self) -> int:
        """Steps from the lowest rate to the highest."""
        return min(self.WARM_UP, self.number_of_steps // 10) if self.warmup_steps is None else self.warmup_steps

    @property
    def number_of_steps(self) -> int:
        """
        Raises:
            RecipeError: they are said in epochs and nobody has counted them (`aki.training.data.counted`).
        """
        if self.steps is None:
            raise RecipeError(f"epochs: {self.epochs} are counted where the stage's sources are open; say steps here.")
        return self.steps

    def _check_length(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            both = "both, steps and epochs" if self.epochs is not None else "neither steps nor epochs"
            raise RecipeError(f"a stage has {both}: say one of them.")
        if self.steps is not None and self.steps < 1:
            raise RecipeError(f"steps must be at least 1, it is {self.steps}.")
        if self.epochs is None:
            return
        if not 0 < self.epochs < math.inf:
            raise RecipeError(f"epochs must be a number above 0, it is {self.epochs}.")
        if not self.sources or self.packing:
            what = "how many samples fit packed rows" if self.packing else "how long data without sources is"
            raise RecipeError(f"nobody knows {what} before training: say steps instead of epochs.")

    def _check_patience(self) -> None:
        if self.patience < 0:
            raise RecipeError(f"patience cannot be negative, it is {self.patience}.")
        if self.patience and (not self.eval_every or self.save_every != self.eval_every):
            raise RecipeError(
                "patience waits for a better held-out accuracy and keeps the best checkpoint: set eval_every and "
                f"save_every to the same steps; they are {self.eval_every} and {self.save_every}."
            )

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
            check_weights(name, getattr(self, name))
        if not 0 <= self.max_bad_share <= 1:
            raise RecipeError(f"max_bad_share is a share, from 0 to 1, it is {self.max_bad_share}.")


@dataclass
class PretrainRecipe(StageRecipe):
    """As SFT, with the paper's other defaults."""

    LOWEST_RATE: ClassVar[float] = 0.1
    WARM_UP: ClassVar[int] = 2000

    task: str = recorded("caption")
    weight_decay: float = recorded(0.01)
