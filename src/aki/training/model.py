"""The model that a recipe starts from, and its processor."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from aki.compat import UNDECLARED_FIELDS
from aki.data.digits import PIXEL_MEAN, PIXEL_STD, corpus
from aki.data.tokenizer import PAD_TOKEN, train_tokenizer
from aki.models import AkiConfig, AkiConnectorConfig, AkiForConditionalGeneration, AkiProcessor
from aki.models.adapters import model_of_adapter
from aki.models.own_template import as_akis, unknown_marks
from aki.models.templates import AKI, CAPTION, END_OF_CHUNK_TOKEN, END_TOKEN, IMAGE_TOKEN, SHORT
from aki.training.data import below
from aki.training.recipe import ModelRecipe, Recipe, RecipeError, known


def build_model(recipe: Recipe, texts: Iterable[str] | None = None) -> tuple[AkiForConditionalGeneration, AkiProcessor]:
    """The recipe's trained backbones joined by a new connector, or all of it new, and a processor.

    Args:
        texts: what a new tokenizer is trained from, in the paper's prompt; None is DigitScenes in a short one.

    Raises:
        RecipeError: an unknown field or kind of model, or backbones of other sizes than the recipe says.
    """
    tokenizer = _tokenizer(recipe, texts)
    if recipe.model.from_backbones is not None:
        model = _join_backbones(recipe.model, tokenizer)
    else:
        model = AkiForConditionalGeneration(model_config(recipe.model, tokenizer))
    processor, end = _processor(recipe, model.config, tokenizer, texts is None)
    if end in tokenizer.get_vocab():
        model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(end)
    return model, processor


def build_processor(recipe: Recipe, texts: Iterable[str] | None = None) -> AkiProcessor:
    """The processor of `build_model`, without a model."""
    tokenizer = _tokenizer(recipe, texts)
    return _processor(recipe, model_config(recipe.model, tokenizer), tokenizer, texts is None)[0]


def _tokenizer(recipe: Recipe, texts: Iterable[str] | None) -> PreTrainedTokenizerBase:
    if recipe.model.from_backbones is not None and recipe.model.from_backbones.text is not None:
        with model_of_adapter(recipe.model.from_backbones.text):
            tokenizer = AutoTokenizer.from_pretrained(recipe.model.from_backbones.text, trust_remote_code=False)
        return _with_special_tokens(tokenizer)
    return train_tokenizer(corpus(recipe.data.grid)) if texts is None else _chat_tokenizer(texts)


def _processor(
    recipe: Recipe, config: AkiConfig, tokenizer: PreTrainedTokenizerBase, digits: bool
) -> tuple[AkiProcessor, str]:
    """The processor, and what ends an answer where that is its template's own choice, else ""."""
    mean, std = (PIXEL_MEAN, PIXEL_STD) if digits else (0.5, 0.5)
    height, width = config.image_size
    images = SiglipImageProcessorPil(
        size={"height": height, "width": width}, image_mean=[mean] * 3, image_std=[std] * 3
    )
    chat, end = _chat_template(recipe, tokenizer, SHORT if digits else AKI)
    templates = {"default": chat, "caption": CAPTION}
    return AkiProcessor(images, tokenizer, config.image_seq_length, chat_template=templates), end


def _chat_template(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, papers: str) -> tuple[str, str]:
    """The chat template that the recipe names or, if none, that fits the vocabulary; and what ends its answers.

    Raises:
        RecipeError: there is none, or its marks are no tokens.
    """
    asked, own = recipe.model.chat_template, tokenizer.chat_template
    foreign = unknown_marks(tokenizer, papers)
    if asked == "aki" or (asked is None and not foreign):
        _check_marks("the paper's prompt", foreign)
        return papers, ""
    if asked in (None, "tokenizer"):
        if not isinstance(own, str):
            raise RecipeError(
                "the language model's tokenizer has no chat template of its own, and no tokens for the paper's prompt "
                f"({', '.join(foreign) or 'which it would take: model.chat_template: aki'}): name a Jinja file in "
                "model.chat_template."
            )
        source, what = own, "the tokenizer's chat template"
    else:
        path = Path(below(recipe.root, asked))
        if not path.is_file():
            raise RecipeError(f"model.chat_template is aki, tokenizer or a file, and there is no file {path}.")
        source, what = path.read_text(), str(path)
    try:
        _check_marks(what, unknown_marks(tokenizer, source))
        return as_akis(tokenizer, source)
    except (TemplateError, ValueError) as error:
        raise RecipeError(f"model.chat_template: {what} cannot be used: {error}") from error


def _check_marks(what: str, unknown: list[str]) -> None:
    if unknown:
        raise RecipeError(
            f"{what} writes {', '.join(unknown)}, which the tokenizer cuts into pieces, because they are no tokens of "
            "its vocabulary: choose another model.chat_template (tokenizer, aki, or a file)."
        )


def tiny(recipe: Recipe) -> Recipe:
    """The recipe with its three parts so small, and new, that a laptop trains them; everything else stays.

    Raises:
        RecipeError: it names no sizes.
    """
    if recipe.model.pretrained:
        raise RecipeError("--tiny shrinks the sizes of a new model, and model.pretrained has its own: leave it out.")
    heads = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = recipe.model.vision | heads | {"image_size": 4 * recipe.model.vision.get("patch_size", 16)}
    text = recipe.model.text | heads | {"max_position_embeddings": 4096}
    text |= {"num_key_value_heads": 2} if "num_key_value_heads" in text else {}
    text.pop("vocab_size", None)  # the trained tokenizer's
    connector = recipe.model.connector | {"depth": 1, "num_heads": 2, "head_dim": 8}
    return replace(recipe, model=ModelRecipe(vision, text, connector))


def model_config(recipe: ModelRecipe, tokenizer: PreTrainedTokenizerBase | None = None) -> AkiConfig:
    """The configuration of a model of the recipe's sizes.

    Args:
        tokenizer: decides the vocabulary; None keeps the recipe's, for counting.
    """
    text = recipe.text | {"pad_token_id": None}
    image_token_id = 0
    if tokenizer is not None:
        text |= {
            "vocab_size": len(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": tokenizer.bos_token_id,
        }
        image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    text_config = _config("text", text)
    _check_fields("connector", recipe.connector, AkiConnectorConfig(**_named(recipe.connector)))
    return AkiConfig(
        vision_config=_config("vision", recipe.vision),
        text_config=text_config,
        connector_config=recipe.connector,
        image_token_id=image_token_id,
        initializer_range=text_config.initializer_range,
    )


def _named(connector: dict[str, Any]) -> dict[str, Any]:
    """Which connector, whose own sizes are fields too."""
    return {"connector": connector["connector"]} if "connector" in connector else {}


def _join_backbones(recipe: ModelRecipe, tokenizer: PreTrainedTokenizerBase) -> AkiForConditionalGeneration:
    """In float32: a stage trains the weights themselves, whatever precision it computes in."""
    assert recipe.from_backbones is not None
    wanted = model_config(recipe)
    for part, name in vars(recipe.from_backbones).items():
        if name is None:
            continue
        with model_of_adapter(name):
            found = AutoConfig.from_pretrained(name, trust_remote_code=False)
        _check_sizes(part, name, getattr(recipe, part), getattr(found, f"{part}_config", found))
    new = model_config(recipe, tokenizer)
    model = AkiForConditionalGeneration.from_backbones(
        recipe.from_backbones.vision or new.vision_config,
        recipe.from_backbones.text or new.text_config,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        vocab_size=len(tokenizer),
        dtype=torch.float32,
        connector_config=wanted.connector_config.to_dict(),
    )
    model.config.text_config.pad_token_id = tokenizer.pad_token_id
    return model


def _with_special_tokens(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """As the authors add them: first padding, where it is the end token's, then those of AKI (paper, section 3)."""
    if tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.eos_token:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    tokenizer.add_tokens([IMAGE_TOKEN, END_OF_CHUNK_TOKEN], special_tokens=True)
    tokenizer.padding_side = "left"
    return tokenizer


def _chat_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerBase:
    return train_tokenizer(texts, bos_token="<s>", more=(END_TOKEN,))


def _check_sizes(part: str, name: str, sizes: dict[str, Any], found: PreTrainedConfig) -> None:
    for field, value in sizes.items():
        actual = getattr(found, field, None)
        if actual != value:
            raise RecipeError(f"{name} has {field} {actual}, model.{part} says {value}: correct the recipe.")


def _config(part: str, sizes: dict[str, Any]):
    """The transformers configuration of a part, whose fields are as strict as the recipe's own."""
    kind = known("model_type", sizes.get("model_type", ""), CONFIG_MAPPING, f"model.{part}")
    _check_fields(part, sizes, AutoConfig.for_model(kind))
    return AutoConfig.for_model(**sizes)


def _check_fields(part: str, sizes: dict[str, Any], defaults: PreTrainedConfig) -> None:
    fields = [field for field in dir(defaults) if not field.startswith("_")]
    for name in sizes:
        known("key", name, [*fields, *UNDECLARED_FIELDS.get(defaults.model_type, ())], f"model.{part}")
