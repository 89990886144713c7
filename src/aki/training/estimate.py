"""What a stage takes, without any of its weights: parameters, tokens, FLOPs and memory, by formulas that are stated."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from aki.data.tokenizer import VOCAB_SIZE
from aki.models import AkiConfig, AkiForConditionalGeneration
from aki.models.other import kind_of
from aki.training.model import model_config
from aki.training.recipe import PARTS, Recipe, RecipeError, StageRecipe

FLOPS_FORMULA = (
    "2 x parameters x tokens + 4 x layers x width x tokens^2 for attention (unmasked) forward; the connector's without "
    "attention, over features and latents; times 3 where it is trained, 2 where only a gradient passes, else 1"
)
MEMORY_FORMULA = (
    "4 bytes a parameter and 4 + 8 where it is trained (gradient, AdamW), over the processes under FSDP, which gathers "
    "in compute precision its largest layer and what is in no layer; activations of 34 bytes x batch x tokens x width "
    "x layers in 16 bits, twice that in 32 (Korthikanti et al., 2022, without attention scores); 10 bytes a text "
    "token's logit; without fragmentation and CUDA's own"
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
    config = _config(recipe)
    if (
        (recipe.model.from_backbones is None or recipe.model.from_backbones.text is None)
        and recipe.model.pretrained is None
        and "vocab_size" not in recipe.model.text
    ):
        config.text_config.vocab_size = VOCAB_SIZE  # a tokenizer is trained, to no more than that
    with torch.device("meta"):
        model = AkiForConditionalGeneration(config)
    tokens = min(stage.max_length, config.text_config.max_position_embeddings)
    if tokens <= config.image_seq_length:
        raise RecipeError(
            f"max_length {tokens} leaves no room for text beside a picture's {config.image_seq_length}: raise it."
        )
    samples_a_row = max(stage.row_tokens // tokens, 1) if stage.packing else 1
    parts = _parts(model, config, stage, tokens)
    return Estimate(
        parts,
        tokens,
        config.image_seq_length,
        stage.number_of_steps,
        samples_a_row * stage.batch_size * stage.gradient_accumulation_steps * recipe.devices,
        processes,
        _memory(model, config, recipe, stage, tokens, processes),
    )


def _config(recipe: Recipe) -> AkiConfig:
    name = recipe.model.pretrained
    if name is None:
        return model_config(recipe.model)
    kind = kind_of(name)
    if kind != AkiConfig.model_type:
        raise RecipeError(f"--dry-run counts AKI's parts; {name} is a {kind} model, which is not counted yet.")
    return AkiConfig.from_pretrained(name)


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
    memory = ", ".join(f"{what} {size / 1e9:.2f}" for what, size in found.memory.items())
    return "\n".join(
        [
            f"{name}: rule {stage.rule}",
            *table,
            f"  tokens a sample: at most {found.tokens}, {found.image_tokens} of them a picture's",
            f"  steps: {found.steps:,} of {found.samples_a_step} samples on {found.processes} process(es), "
            f"{found.steps * found.samples_a_step:,} samples in all",
            f"  FLOPs: {found.flops:.3g}, all samples at full length",
            f"    = {FLOPS_FORMULA}",
            f"  memory of a process: {sum(found.memory.values()) / 1e9:.2f} GB: {memory}",
            f"    = {MEMORY_FORMULA}",
        ]
    )


def _parts(model: AkiForConditionalGeneration, config: AkiConfig, stage: StageRecipe, tokens: int) -> dict[str, Part]:
    vision, text = config.vision_config, config.text_config
    embeddings = {id(parameter) for parameter in model.get_input_embeddings().parameters()}
    embedded = 0 if text.tie_word_embeddings else _count(model, embeddings)
    sizes = {part: _count(model.parts[part]) for part in PARTS}
    forward = {
        "vision_encoder": _forward(sizes["vision_encoder"], vision, config.num_patches),
        "connector": 2.0 * sizes["connector"] * (config.num_patches + config.image_seq_length),
        "language_model": _forward(sizes["language_model"] - embedded, text, tokens),
    }
    forward = {part: stage.copies * flops for part, flops in forward.items()}
    parts, gradient_passes = {}, False
    for part in PARTS:
        trained = part not in stage.frozen
        passes = 3 if trained else 2 if gradient_passes else 1
        gradient_passes |= trained
        parts[part] = Part(sizes[part], sizes[part] if trained else 0, forward[part], passes)
    return parts


def _forward(parameters: int, config, tokens: int) -> float:
    return 2.0 * parameters * tokens + 4.0 * config.num_hidden_layers * config.hidden_size * tokens**2


def _memory(
    model: AkiForConditionalGeneration,
    config: AkiConfig,
    recipe: Recipe,
    stage: StageRecipe,
    tokens: int,
    processes: int,
) -> dict[str, float]:
    text = config.text_config
    shards = processes if recipe.fsdp is not None else 1
    everything = _count(model)
    trained = sum(_count(model.parts[part]) for part in PARTS if part not in stage.frozen)
    element = 2 if recipe.bf16 else 4
    rows = stage.batch_size * stage.copies
    length = stage.row_tokens if stage.packing else tokens
    wrapped = (recipe.fsdp or {}).get("transformer_layer_cls_to_wrap", ())
    layers = [_count(module) for module in model.modules() if type(module).__name__ in wrapped]
    return {
        "weights": 4 * everything / shards,
        "gradients": 4 * trained / shards,
        "AdamW": 8 * trained / shards,
        "gathered": element * (everything - sum(layers) + max(layers, default=0)) if shards > 1 else 0,
        "activations": 17.0 * element * rows * length * text.hidden_size * text.num_hidden_layers,
        "logits": 10.0 * rows * (length - config.image_seq_length) * text.vocab_size,
    }


def _count(module: nn.Module, only: set[int] | None = None) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if only is None or id(parameter) in only)
