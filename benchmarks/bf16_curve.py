"""The digits recipe's loss in float32 and under bfloat16 autocast, drawn one over the other; seconds a step of both.

Both stages, shortened and in batches of 16, from the same seed: the same weights at the start and the same batches.
bfloat16 pays where the CPU multiplies it in hardware and the model is large enough for its products to matter; this one
is small on purpose.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import matplotlib
import torch

from aki.models.features import computes_bfloat16
from aki.training.recipe import STAGES, Recipe, load_recipe
from aki.training.stages import Job, run_stage

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RECIPE = "digits"
BATCH = 16
PRECISIONS = {"float32": False, "bfloat16 autocast": True}


def shortened(steps: int, bf16: bool) -> Recipe:
    recipe = load_recipe(RECIPE)
    recipe.bf16, recipe.workers, recipe.data.test_size = bf16, 0, 60
    for name in STAGES:
        stage = recipe.stage(name)
        stage.steps, stage.log_every, stage.eval_every, stage.save_every = steps, max(1, steps // 30), 0, 0
        stage.warmup_steps, stage.batch_size = min(stage.warm_up, steps // 4), BATCH
    return recipe


def run(steps: int, bf16: bool, folder: Path) -> dict[str, dict[str, Any]]:
    """Stage -> its losses, [[step, mean since the last], ...], and seconds a step."""
    results: dict[str, dict[str, Any]] = {}
    start_from = None
    for name in STAGES:
        result = run_stage(Job(shortened(steps, bf16), name, folder / name, start_from, title=f"{name}, bf16 {bf16}"))
        results[name] = {"losses": result["losses"], "seconds_a_step": result["seconds"] / steps}
        start_from = folder / name
    return results


def draw(results: dict[str, dict[str, dict[str, Any]]], path: Path) -> None:
    figure, axes = plt.subplots(1, len(STAGES), figsize=(10, 3.6), layout="constrained")
    for axis, stage in zip(axes, STAGES, strict=True):
        for (name, stages), style in zip(results.items(), ("-", "--"), strict=True):
            axis.plot(*zip(*stages[stage]["losses"], strict=True), style, label=name)
        axis.set_title(f"{stage} (rule {load_recipe(RECIPE).stage(stage).rule})")
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("training loss")
    axes[0].legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="of each stage")
    parser.add_argument("--quick", action="store_true", help="30 steps")
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    parser.add_argument("--picture", type=Path, help="also draw the curves there")
    options = parser.parse_args()
    steps = 30 if options.quick else options.steps
    results = {}
    for name, bf16 in PRECISIONS.items():
        with tempfile.TemporaryDirectory() as folder:
            results[name] = run(steps, bf16, Path(folder))
    print(f"bfloat16 in hardware: {computes_bfloat16(torch.device('cpu'))}; threads: {torch.get_num_threads()}")
    print("| stage | precision | loss at the end | ms a step |")
    print("| --- | --- | ---: | ---: |")
    for stage in STAGES:
        for name, stages in results.items():
            own = stages[stage]
            print(f"| {stage} | {name} | {own['losses'][-1][1]:.4f} | {1000 * own['seconds_a_step']:.1f} |")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    if options.picture:
        draw(results, options.picture)


if __name__ == "__main__":
    main()
