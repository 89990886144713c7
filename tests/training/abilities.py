"""What each family can be trained with by a recipe: one step of its tiny model for each, for docs/models.md."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from clip_families import CLIP_FAMILIES, RATE
from families import FAMILIES
from PIL import Image

from aki.attention import CannotUnlock
from aki.data.report import TooManyBadSamples
from aki.models.other import load_any, parameters_of
from aki.training.recipe import AdapterRecipe, ModelRecipe, Recipe, RecipeError, SourceRecipe, StageRecipe
from aki.training.stages import Job, run_stage
from aki.training.start import load_processor

Part = dict[str, Any]
EVERY_FAMILY = FAMILIES | CLIP_FAMILIES
TITLES = {
    "llava": "LLaVA",
    "llava_next": "LLaVA-NeXT",
    "llava_onevision": "LLaVA-OneVision",
    "idefics3": "Idefics3",
    "smolvlm": "SmolVLM",
    "qwen2_5_vl": "Qwen2.5-VL",
    "internvl": "InternVL",
    "gemma3": "Gemma 3",
    "paddleocr_vl": "PaddleOCR-VL",
    "qwen2_audio": "Qwen2-Audio",
    "aki": "AKI",
}
RED = {"type": "image", "image": "red.png"}
FILM = {"type": "video", "video": ["red.png", "blue.png", "red.png", "blue.png"]}
TONE = {"type": "audio", "audio": "tone.wav"}
SAID = {"type": "text", "text": "is it red or blue?"}
ABILITIES: dict[str, tuple[Callable[[Part], list[Part]], dict[str, Any], dict[str, Any]]] = {
    "several pictures": (lambda own: [own, SAID, own], {}, {}),
    "video": (lambda own: [FILM], {}, {}),
    "audio": (lambda own: [TONE], {}, {}),
    "scopes": (lambda own: [{"type": "scope", "content": [own, SAID]}, own], {"rule": "mma_scoped"}, {}),
    "packed rows": (lambda own: [own], {"packing": True, "row_tokens": 400, "batch_size": 1}, {}),
    "LoRA": (lambda own: [own], {}, {"adapter": AdapterRecipe(r=2, modules_to_save=("connector",))}),
}
"""Ability -> what a question shows, of the kind that the family takes; what differs in the stage, and in the recipe."""


def ask(family: Path, ability: str, folder: Path) -> str:
    """Train a step of a family's model.

    Args:
        family: the folder of the model.
        folder: an empty one.

    Returns:
        "yes", after a step with that, which moved the connector; "" where the processor takes no such part; else the
        sentence by which the recipe is refused.
    """
    shown, stage, more = ABILITIES[ability]
    kinds = load_processor(family).media_kinds
    parts = shown(RED if "image" in kinds else TONE)
    if any(part["type"] in ("video", "audio") and part["type"] not in kinds for part in parts):
        return ""
    write_data(folder, parts)
    recipe = replace(recipe_of(family, folder, **stage), **more)
    try:
        result = run_stage(Job(recipe, "sft", folder / "run", report=lambda news: None))
    except (CannotUnlock, RecipeError, TooManyBadSamples) as refused:
        return str(refused)
    assert [math.isfinite(loss) for _, loss in result["losses"]] == [True]
    before, after = (parameters_of(load_any(one, torch.float32)[0])["connector"] for one in (family, folder / "run"))
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)), "nothing of the media was learned"
    return "yes"


def write_data(folder: Path, parts: list[Part]) -> None:
    """Chats of one turn and of two, which show that, with their files."""
    for name in ("red", "blue"):
        Image.new("RGB", (20, 20), name).save(folder / f"{name}.png")
    soundfile.write(folder / "tone.wav", np.sin(np.arange(RATE // 4) / 5).astype("float32"), RATE)
    turn = [{"role": "user", "content": [*parts, SAID]}, {"role": "assistant", "content": "it is red"}]
    lines = [json.dumps({"messages": chat}) for chat in (turn, [*turn, *turn])]
    (folder / "chats.jsonl").write_text("\n".join(lines) + "\n")


def recipe_of(model: Path, data: Path, **stage: Any) -> Recipe:
    source = SourceRecipe("messages", (str(data / "chats.jsonl"),), (str(data),))
    lengths = {"steps": 1, "warmup_steps": 0, "save_every": 0, "log_every": 1, "max_length": 400, "batch_size": 2}
    fields = {"rule": "mma", "learning_rate": 1e-3, "max_bad_share": 0.0, "sources": (source,), **lengths, **stage}
    return Recipe("mine", ModelRecipe(pretrained=str(model)), sft=StageRecipe(**fields), workers=0)
