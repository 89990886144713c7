"""What a stage takes, without any of its weights: parameters, tokens, FLOPs and memory, by formulas that are stated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from aki.data.tokenizer import VOCAB_SIZE
from aki.models import AkiForConditionalGeneration
from aki.models.adapters import model_of_adapter
from aki.models.other import base_of, is_aki, model_on_meta, parameters_of
from aki.training.adapting import freeze, with_adapter
from aki.training.memory import MEMORY_FORMULA, checkpoints, memory_of
from aki.training.model import model_config
from aki.training.recipe import PARTS, Recipe, RecipeError, StageRecipe

FLOPS_FORMULA = (
    "2 x parameters x tokens + 4 x layers x width x tokens^2 for attention (unmasked) forward; the connector's without "
    "attention, over features and latents (of other families every part over all tokens); "
    "times 3 where it is trained, 2 where only a gradient passes or an adapter is trained, else 1; once more with "
    "gradient checkpointing"
)


@dataclass(frozen=True)
class Part:
    """Parameters and forward FLOPs a sample of one part, and how many times that training takes."""

    parameters: int
    trained: int
    forward_flops: float
    passes: int


@dataclass(frozen=True)
class Estimate:
    """Of one stage on so many processes.

    Attributes:
        tokens: at most, of a sample with one picture; image_tokens of them are the picture's.
        samples_a_step: over all processes; of packed rows as many as fit in at full length.
        memory: part of it -> bytes on each process.
    """

    parts: dict[str, Part]
    tokens: int
    image_tokens: int
    steps: int
    samples_a_step: int
    processes: int
    memory: dict[str, float]

    @property
    def flops_a_sample(self) -> float:
        return sum(part.forward_flops * part.passes for part in self.parts.values())

    @property
    def flops(self) -> float:
        return self.flops_a_sample * self.samples_a_step * self.steps


def estimate(recipe: Recipe, stage: StageRecipe, processes: int) -> Estimate:
    """
    Args:
        processes: that share a step.

    Raises:
        RecipeError: an unknown field or kind of model, processes that cannot share a step, or no room for a picture.
    """
    recipe.accumulation(stage, processes)
    model = _model(recipe)
    text = model.config.get_text_config()
    tokens = min(stage.max_length, text.max_position_embeddings)
    image_tokens = model.config.image_seq_length if is_aki(model) else 0
    if tokens <= image_tokens:
        raise RecipeError(f"max_length {tokens} leaves no room for text beside a picture's {image_tokens}: raise it.")
    if recipe.adapter is not None:
        model = with_adapter(model, recipe.adapter, None)
    freeze(model, recipe, stage)
    samples_a_row = max(stage.row_tokens // tokens, 1) if stage.packing else 1
    length = stage.row_tokens if stage.packing else tokens
    return Estimate(
        _parts(model, recipe, stage, tokens),
        tokens,
        image_tokens,
        stage.number_of_steps,
        samples_a_row * stage.batch_size * stage.gradient_accumulation_steps * recipe.devices,
        processes,
        memory_of(model, recipe, stage, length, length - image_tokens, processes),
    )


def _model(recipe: Recipe) -> Any:
    """The modules of the recipe's model, without weights; of a trained one its configuration is enough."""
    name = recipe.model.pretrained
    if name is not None:
        with model_of_adapter(name):
            return model_on_meta(name)
    config = model_config(recipe.model)
    new_tokenizer = recipe.model.from_backbones is None or recipe.model.from_backbones.text is None
    if new_tokenizer and "vocab_size" not in recipe.model.text:
        config.text_config.vocab_size = VOCAB_SIZE  # a tokenizer is trained, to no more than that
    with torch.device("meta"):
        return AkiForConditionalGeneration(config)


def describe(name: str, stage: StageRecipe, found: Estimate) -> str:
    """The estimate for a person."""
    rows = [("part", "parameters", "trained", "TFLOPs a sample")]
    rows += [
        (part, f"{of.parameters:,}", f"{of.trained:,}", f"{of.forward_flops * of.passes / 1e12:.3g}")
        for part, of in found.parts.items()
    ]
    total = sum(part.parameters for part in found.parts.values()), sum(part.trained for part in found.parts.values())
    rows += [("all", f"{total[0]:,}", f"{total[1]:,}", f"{found.flops_a_sample / 1e12:.3g}")]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    table = [
        "  " + row[0].ljust(widths[0]) + "".join(f"  {cell:>{w}}" for cell, w in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]
    pictured = f"{found.image_tokens} of them a picture's" if found.image_tokens else "pictures included"
    memory = ", ".join(f"{what} {size / 1e9:.2f}" for what, size in found.memory.items())
    return "\n".join(
        [
            f"{name}: rule {stage.rule}",
            *table,
            f"  tokens a sample: at most {found.tokens}, {pictured}",
            f"  steps: {found.steps:,} of {found.samples_a_step} samples on {found.processes} process(es), "
            f"{found.steps * found.samples_a_step:,} samples in all",
            f"  FLOPs: {found.flops:.3g}, all samples at full length",
            f"    = {FLOPS_FORMULA}",
            f"  memory of a process: {sum(found.memory.values()) / 1e9:.2f} GB: {memory}",
            f"    = {MEMORY_FORMULA}",
        ]
    )


def _parts(model: Any, recipe: Recipe, stage: StageRecipe, tokens: int) -> dict[str, Part]:
    parameters = parameters_of(model)
    sizes = {part: sum(parameter.numel() for parameter in found) for part, found in parameters.items()}
    learned = {part: sum(p.numel() for p in found if p.requires_grad) for part, found in parameters.items()}
    forward = _forward_flops(base_of(model), sizes, tokens)
    parts, gradient_passes = {}, False
    for part in PARTS:
        trained = 2 * learned[part] >= sizes[part] > 0
        passes = 3 if trained else 2 if learned[part] or gradient_passes else 1
        passes += checkpoints(recipe) and passes > 1
        gradient_passes |= learned[part] > 0
        parts[part] = Part(sizes[part], learned[part], stage.copies * forward[part], passes)
    return parts


def _forward_flops(model: Any, sizes: dict[str, int], tokens: int) -> dict[str, float]:
    config, text = model.config, model.config.get_text_config()
    embeddings = sum(parameter.numel() for parameter in model.get_input_embeddings().parameters())
    multiplied = sizes["language_model"] - (0 if text.tie_word_embeddings else embeddings)
    language = {"language_model": _forward(multiplied, text, tokens)}
    if not is_aki(model):
        return language | {part: 2.0 * sizes[part] * tokens for part in ("vision_encoder", "connector")}
    return language | {
        "vision_encoder": _forward(sizes["vision_encoder"], config.vision_config, config.num_patches),
        "connector": 2.0 * sizes["connector"] * (config.num_patches + config.image_seq_length),
    }


def _forward(parameters: int, config: Any, tokens: int) -> float:
    return 2.0 * parameters * tokens + 4.0 * config.num_hidden_layers * config.hidden_size * tokens**2
