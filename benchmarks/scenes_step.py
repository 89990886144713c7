"""Seconds of a core that an SFT step of the recipe `scenes` takes, by what is trained and in which numbers.

    python benchmarks/scenes_step.py

The variants take turns in one process; CPU time is given, which a busy machine disturbs less than time on the clock.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from aki.evaluation.steps import row_steps
from aki.training.recipe import Recipe, load_recipe

PACKED: dict[str, Any] = {"padding_free": False, "packing": True, "batch_size": 1, "row_tokens": 512, "max_length": 256}
VARIANTS: dict[str, dict[str, Any]] = {
    "as in the recipe": {},
    "padded": {"sft": {"padding_free": False}},
    "a packed row of 512 tokens": {"sft": PACKED},
    "bfloat16 autocast": {"bf16": True},
    "MMA": {"sft": {"rule": "mma"}},
    "echo": {"sft": {"order": "echo"}},
    "LoRA": {"adapter": {"r": 32, "alpha": 64, "modules_to_save": ["connector"]}},
}
"""What differs from the recipe; packed, a row holds 12 questions on average."""


def variants(start: str) -> Recipe:
    recipe = load_recipe("scenes")
    return replace(recipe, model=replace(recipe.model, pretrained=start), rows=VARIANTS, bf16=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--start", default="runs/scenes/able")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="two rounds")
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    options = parser.parse_args()
    recipe = variants(options.start)
    taken: dict[str, list[float]] = {name: [] for name in VARIANTS}
    with TemporaryDirectory() as folder:
        steps = {name: row_steps(recipe, [name], Path(folder))[name] for name in VARIANTS}
        for number in range(1 + (2 if options.quick else options.rounds)):
            for name, step in steps.items():
                begun = time.process_time()
                step()
                if number:
                    taken[name].append(time.process_time() - begun)
    print(f"{torch.get_num_threads()} thread(s)")
    print("| step of 12 questions | core seconds | relative |\n| --- | ---: | ---: |")
    base = statistics.median(next(iter(taken.values())))
    medians = {name: statistics.median(seconds) for name, seconds in taken.items()}
    for name, seconds in medians.items():
        print(f"| {name} | {seconds:.2f} | {seconds / base:.2f} |")
    if options.json:
        options.json.write_text(json.dumps(medians, indent=1) + "\n")


if __name__ == "__main__":
    main()
