"""Writes the table of what fits where in `docs/training.md`: `python docs/fits_table.py`; a line of it alone with the
model's and the way's name. Models are counted from their configurations; nothing is loaded."""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from transformers import LlavaConfig, PreTrainedConfig, Qwen2VLConfig

from aki.training.estimate import estimate
from aki.training.recipe import AdapterRecipe, ModelRecipe, QuantizationRecipe, Recipe, StageRecipe, load_recipe

PAGE = Path(__file__).with_name("training.md")
BEGIN, END = "<!-- made by docs/fits_table.py -->", "<!-- end of what fits -->"
CARDS = (24, 48, 80)
SHARE = 0.9
"""Of a card's memory; the rest is CUDA's own and fragmentation."""
STAGE = StageRecipe(task="question", rule="mma", steps=1, batch_size=1, learning_rate=1e-5, max_length=1024)
TRAINER = {"gradient_checkpointing": True, "optim": "adamw_8bit"}
WAYS = {
    "full": {},
    "lora": {"adapter": AdapterRecipe()},
    "qlora": {"adapter": AdapterRecipe(), "quantization": QuantizationRecipe(4)},
}
CONFIGURATIONS = {
    # Sizes of Qwen2-VL-2B.
    "qwen2-vl-2b": lambda: Qwen2VLConfig(
        text_config={
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
            "tie_word_embeddings": True,
        },
        vision_config={"hidden_size": 1536},
        tie_word_embeddings=True,
    ),
    # transformers' defaults are LLaVA-1.5-7B.
    "llava-1.5-7b": LlavaConfig,
}
MODELS = ("aki-4b", *CONFIGURATIONS)


def recipe_of(model: str, way: str, folder: Path) -> Recipe:
    """One device, a sample of 1,024 tokens a step, in bfloat16, with gradient checkpointing and an 8-bit AdamW."""
    if model == "aki-4b":
        named: ModelRecipe = load_recipe("aki-4b/sft").model
    else:
        made: PreTrainedConfig = CONFIGURATIONS[model]()
        made.save_pretrained(folder)
        named = ModelRecipe(pretrained=str(folder))
    return Recipe(model, named, sft=replace(STAGE), bf16=True, trainer=dict(TRAINER), **WAYS[way])


def line(model: str, way: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        recipe = recipe_of(model, way, Path(folder))
        found = estimate(recipe, recipe.sft, 1)
    size = sum(part.parameters for part in found.parts.values()) / 1e9
    needed = sum(found.memory.values()) / 1e9
    fits = " | ".join("yes" if needed < SHARE * card else "no" for card in CARDS)
    return f"| {model} | {size:.2f} | {way} | {needed:.1f} | {fits} | `python docs/fits_table.py {model} {way}` |"


def main(*asked: str) -> None:
    if asked:
        print(line(*asked))
        return
    head = [
        "| model | billion parameters | trained | GB | " + " | ".join(f"{card} GB" for card in CARDS) + " | command |"
    ]
    head += ["|---|--:|---|--:|---|---|---|---|"]
    rows = [line(model, way) for model in MODELS for way in WAYS]
    before, _, rest = PAGE.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text("\n".join([before + BEGIN, *head, *rows, END]) + after)


if __name__ == "__main__":
    main(*sys.argv[1:])
