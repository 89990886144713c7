"""Four ways to pre-train on captions before the same SFT under MMA, on DigitScenes, and what each learns.

    python benchmarks/pretraining.py --seeds 5 --output results/pretraining

naive: MMA opened on captions of which all text is learned, which leaks; the guard is switched off here and nowhere
else. causal: the paper's. split: `seen: 0.5` under MMA. split + causal: the same with `also_causal`, in half the steps,
so that all four read equal tokens. Each finished cell is a small file in the output's `cells`, and is never trained
again.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from aki.data.collate import ChatCollator
from aki.data.digits import DigitScenes
from aki.models import AkiForConditionalGeneration, AkiProcessor
from aki.training.recipe import PretrainRecipe, Recipe, load_recipe
from aki.training.stages import Job, run_stage, write_json

WAYS = ("naive", "causal", "split", "split + causal")
SEEN = 0.5
CAPTIONS, GENERATED = 512, 96
"""Held-out captions whose loss is measured, and scenes that are described."""


def pretraining(way: str, stage: PretrainRecipe) -> PretrainRecipe:
    """The stage of a way; all read as many tokens."""
    if way == "causal":
        return stage
    if way == "naive":
        return replace(stage, rule="mma")
    if way == "split":
        return replace(stage, rule="mma", seen=SEEN)
    return replace(stage, rule="mma", seen=SEEN, also_causal=True, steps=stage.number_of_steps // 2)


class Everything(ChatCollator):
    """All of a caption is learned, and the picture sees all of it."""

    def _labelled(self, batch: dict[str, Any]) -> dict[str, Any]:
        labelled = super()._labelled(batch)
        return labelled | {"prompt_block_ids": torch.where(batch["attention_mask"] > 0, 0, -1)}


def run(way: str, seed: int, recipe: Recipe, output: Path) -> dict[str, Any]:
    """One cell: both stages and what is measured after each."""
    assert recipe.pretrain is not None
    recipe = replace(recipe, seed=seed, pretrain=pretraining(way, recipe.pretrain))
    folder = output / f"{way.replace(' ', '')}-{seed}"
    job = Job(recipe, "pretrain", folder / "pretrain", resume=True, title=f"{way} {seed} captions")
    if way == "naive":
        with (
            patch("aki.training.trainer.check_layout", lambda *_: None),
            patch("aki.training.data.ChatCollator", Everything),
        ):
            first = run_stage(job)
    else:
        first = run_stage(job)
    second = run_stage(
        Job(recipe, "sft", folder / "sft", folder / "pretrain", resume=True, title=f"{way} {seed} questions")
    )
    losses = [loss for _, loss in first["losses"]]
    return {
        "way": way,
        "seed": seed,
        "training_loss": float(np.mean(losses[-max(len(losses) // 10, 1) :])),
        "tokens": first["tokens"],
        **captions(folder / "pretrain", recipe),
        "sft_accuracy": second["test"]["accuracy"],
    }


@torch.inference_mode()
def captions(folder: Path, recipe: Recipe) -> dict[str, float]:
    """Loss a token of held-out captions asked causally, and the share of a scene's places that are told rightly."""
    model = AkiForConditionalGeneration.from_pretrained(folder).eval()
    processor = AkiProcessor.from_pretrained(folder)
    model.config.attention_rule = "causal"
    side = processor.image_processor.size["height"]
    scenes = DigitScenes("test", "caption", CAPTIONS, side, recipe.data.grid)
    collate = ChatCollator(processor, 512, "caption")
    batches = [collate([scenes[i] for i in range(at, at + 64)]) for at in range(0, CAPTIONS, 64)]
    loss = float(np.mean([model(**batch).loss.item() for batch in batches]))
    told = []
    for index in range(GENERATED):
        scene, _ = scenes.scene(index)
        prompt = processor.apply_chat_template(
            [scenes[index].messages[:1]],
            chat_template="caption",
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"add_special_tokens": False},
        )
        ids = model.generate(**prompt, max_new_tokens=72, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        said = processor.decode(ids, skip_special_tokens=True)
        told += [_is_told(said, place, colour, digit) for _, place, digit, colour in scene.cells()]
    return {"held_out_loss": loss, "told": float(np.mean(told))}


def _is_told(said: str, place: str, colour: str, digit: int) -> bool:
    parts = {part.strip() for part in said.split(",")}
    return bool(parts & {f"{place} {colour} {digit}", f"{place} {digit} {colour}"})


def table(cells: list[dict[str, Any]]) -> str:
    """Means over seeds with 95 % intervals (Student's t)."""
    from scipy.stats import t

    lines = [
        "| way | seeds | training loss | held-out loss, asked causally | places told rightly | accuracy after SFT |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for way in WAYS:
        own = [cell for cell in cells if cell["way"] == way]
        if not own:
            continue
        shown = []
        for name, scale, digits in (
            ("training_loss", 1, 3),
            ("held_out_loss", 1, 3),
            ("told", 100, 1),
            ("sft_accuracy", 100, 1),
        ):
            values = np.array([cell[name] for cell in own]) * scale
            half = t.ppf(0.975, len(own) - 1) * values.std(ddof=1) / len(own) ** 0.5 if len(own) > 1 else float("nan")
            shown.append(f"{values.mean():.{digits}f} ± {half:.{digits}f}")
        lines.append(f"| {way} | {len(own)} | {' | '.join(shown)} |")
    return "\n".join(lines)


def draw(cells: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    for axis, (name, title) in zip(
        axes,
        (
            ("training_loss", "training loss"),
            ("told", "places told rightly, asked causally"),
            ("sft_accuracy", "accuracy after the same SFT"),
        ),
        strict=True,
    ):
        for x, way in enumerate(WAYS):
            values = [cell[name] for cell in cells if cell["way"] == way]
            axis.scatter([x] * len(values), values, color="#2b6cb0", alpha=0.6)
            if values:
                axis.hlines(np.mean(values), x - 0.25, x + 0.25, color="#1a202c")
        axis.set_xticks(range(len(WAYS)), [way.replace(" + ", "\n+ ") for way in WAYS])
        axis.set_title(title, fontsize=10)
        axis.set_ylim(bottom=0)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--recipe", type=Path, default=Path("digits"))
    parser.add_argument("--steps", type=int, nargs=2, default=(1000, 1000), help="of captions, of questions")
    parser.add_argument("--output", type=Path, default=Path("results/pretraining"))
    parser.add_argument("--picture", type=Path, default=Path("docs/pretraining.png"))
    parser.add_argument("--quick", action="store_true", help="a few steps, whether it runs")
    options = parser.parse_args()
    recipe = load_recipe(options.recipe)
    steps = (6, 4) if options.quick else options.steps
    stages: dict[str, Any] = {
        name: replace(recipe.stage(name), steps=count, eval_every=0, save_every=0)
        for name, count in zip(("pretrain", "sft"), steps, strict=True)
    }
    recipe = replace(recipe, **stages, rows={}, workers=0)
    if options.quick:
        recipe = replace(recipe, data=replace(recipe.data, eval_size=12, test_size=24))
    kept = options.output / "cells"
    kept.mkdir(parents=True, exist_ok=True)
    for seed in range(options.seeds):
        for way in options.ways:
            file = kept / f"{way.replace(' ', '')}-{seed}.json"
            if not file.exists():
                write_json(file, run(way, seed, recipe, options.output))
                print(file.read_text(), flush=True)
    cells = [json.loads(file.read_text()) for file in sorted(kept.glob("*.json"))]
    print(table(cells))
    draw(cells, options.picture)
    print(f"drawn in {options.picture}")


if __name__ == "__main__":
    main()
