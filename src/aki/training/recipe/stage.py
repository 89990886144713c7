"""What a recipe says of one stage."""

from __future__ import annotations

from dataclasses import dataclass

from aki.attention import get_rule
from aki.data.orders import ORDERS
from aki.training.recipe.data import ShardsRecipe, SourceRecipe, check_weights
from aki.training.recipe.errors import RecipeError, one_of

PARTS = ("vision_encoder", "connector", "language_model")
MIXTURES = ("weights", "proportional", "uniform")


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
        one_of("mixture", self.mixture, MIXTURES)
        self._check_data()
        one_of("task", self.task, ("caption", "question"))
        one_of("order", self.order, tuple(ORDERS))
        self._check_seen()
        for part in self.frozen:
            one_of("frozen", part, PARTS)
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
            check_weights(name, getattr(self, name))
        if not 0 <= self.max_bad_share <= 1:
            raise RecipeError(f"max_bad_share is a share, from 0 to 1, it is {self.max_bad_share}.")
