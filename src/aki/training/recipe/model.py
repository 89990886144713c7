"""What a recipe says of the model, and of what is trained of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from aki.training.recipe.errors import RecipeError, missing_key, one_of

KINDS_OF_ADAPTERS: dict[str, dict[str, Any]] = {"lora": {}, "dora": {"use_dora": True}, "rslora": {"use_rslora": True}}
"""Kind -> what makes it one in PEFT's LoraConfig."""


@dataclass
class BackbonesRecipe:
    """Hub ids or folders of trained parts.

    Attributes:
        vision: the vision encoder; absent makes a new one.
        text: the language model with its tokenizer; absent makes new ones.
    """

    vision: str | None = None
    text: str | None = None

    def __post_init__(self) -> None:
        if self.vision is None and self.text is None:
            raise RecipeError("model.from_backbones names no trained part: give it vision, text or both, or leave it.")


@dataclass
class ModelRecipe:
    """A trained model, or the parts of a new one, each as its transformers configuration: `model_type` and the sizes
    that differ from its defaults.

    Attributes:
        vision: the vision encoder's.
        text: the language model's.
        connector: the connector's, see `AkiConnectorConfig`.
        pretrained: a folder or hub id of any multimodal model that `aki.unlock` takes, or of AKI's own; it has its
            sizes, its processor and its chat template. Absent makes a new model of the sizes.
        from_backbones: where trained parts come from; absent starts from random weights of those sizes. The sizes above
            must be theirs: what a run needs is known before anything is downloaded.
        chat_template: `aki` (the paper's prompt), `tokenizer` (the trained language model's own), or a Jinja file. If
            absent the paper's where the vocabulary has its marks, else the language model's own.
    """

    vision: dict[str, Any] = field(default_factory=dict)
    text: dict[str, Any] = field(default_factory=dict)
    connector: dict[str, Any] = field(default_factory=dict)
    from_backbones: BackbonesRecipe | None = None
    pretrained: str | None = None
    chat_template: str | None = None

    @staticmethod
    def needs(values: Mapping[str, Any]) -> dict[str, str]:
        """Keys that are missing beside these, and what to do."""
        parts = () if values.get("pretrained") else ("vision", "text", "connector")
        return {part: "name its sizes, or model.pretrained" for part in parts if not values.get(part)}

    def __post_init__(self) -> None:
        if self.pretrained is None:
            if wrong := [missing_key("model", key, hint) for key, hint in self.needs(vars(self)).items()]:
                raise RecipeError("\n".join(wrong))
        elif self.from_backbones is not None or self.vision or self.text or self.connector:
            raise RecipeError("model.pretrained is a whole model, with sizes of its own: leave the other keys out.")
        elif self.chat_template is not None:
            raise RecipeError("model.pretrained has a chat template of its own: leave model.chat_template out.")


@dataclass
class AdapterRecipe:
    """What is trained of a model whose own weights stay, by PEFT.

    Attributes:
        kind: `lora`, `dora` or `rslora`.
        r: rank of the low-rank matrices.
        alpha: their scale.
        dropout: of what goes into them, a share.
        target_modules: names of the layers that get them, or PEFT's `all-linear`; those of the language model's linear
            layers if absent.
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
        one_of("adapter.kind", self.kind, tuple(KINDS_OF_ADAPTERS))
        if self.r < 1:
            raise RecipeError(f"adapter.r must be at least 1, it is {self.r}.")


@dataclass
class QuantizationRecipe:
    """Weights of the language model in fewer bits, by bitsandbytes; an adapter is trained over them.

    Attributes:
        bits: 4 (NF4) or 8, a weight.
    """

    bits: int = 4

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise RecipeError(f"quantization.bits is 4 or 8, it is {self.bits}.")
