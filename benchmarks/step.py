"""Seconds a training step and peak memory of causal attention and of MMA on the digits recipe, in one run.

Both rules take turns on the same weights and the same batches, so that a noisy machine disturbs both alike; peak memory
is that of a process of its own a rule.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import time
from pathlib import Path

import torch

from aki.data.collate import ChatCollator
from aki.data.digits import DigitScenes
from aki.models import AkiForConditionalGeneration
from aki.training.recipe import load_recipe
from aki.training.stages import build_model
from aki.training.trainer import guard_batch

RULES = ("causal", "mma")
RECIPE = Path(__file__).parents[1] / "recipes" / "digits.yaml"


def train_step(
    model: AkiForConditionalGeneration, optimizer: torch.optim.Optimizer, batch: dict, rule: str
) -> tuple[float, float]:
    """One step, leak guard included, as the trainer does it; returns its seconds and those of the guard."""
    model.config.attention_rule = rule
    started = time.perf_counter()
    guard_batch(model, batch)
    guarded = time.perf_counter()
    model(**batch).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - started, guarded - started


def set_up(batches: int):
    recipe = load_recipe(RECIPE)
    torch.manual_seed(0)
    model, processor = build_model(recipe)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    size = recipe.stage("sft").batch_size
    data = DigitScenes("train", "question", batches * size, processor.image_processor.size["height"], recipe.data.grid)
    collate = ChatCollator(processor, recipe.stage("sft").max_length)
    return model.train(), optimizer, [collate([data[i * size + j] for j in range(size)]) for i in range(batches)]


def time_steps(steps: int) -> dict[str, list[tuple[float, float]]]:
    model, optimizer, batches = set_up(8)
    seconds: dict[str, list[tuple[float, float]]] = {rule: [] for rule in RULES}
    for step in range(steps + 2):
        order = RULES if step % 2 else RULES[::-1]
        for rule in order:
            taken = train_step(model, optimizer, batches[step % len(batches)], rule)
            if step >= 2:
                seconds[rule].append(taken)
    return seconds


def peak_memory(rule: str, queue: multiprocessing.Queue) -> None:
    model, optimizer, batches = set_up(2)
    for batch in batches * 2:
        train_step(model, optimizer, batch, rule)
    queue.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def measure_memory(rule: str) -> float:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=peak_memory, args=(rule, queue))
    process.start()
    megabytes = queue.get()
    process.join()
    return megabytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    options = parser.parse_args()
    memory = {rule: measure_memory(rule) for rule in RULES}
    seconds = time_steps(10 if options.quick else 60)
    model, _, _ = set_up(1)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    ratios = [mma / causal for (causal, _), (mma, _) in zip(seconds["causal"], seconds["mma"], strict=True)]
    rows = [
        {
            "rule": rule,
            "seconds": statistics.median(step for step, _ in seconds[rule]),
            "ratio_to_causal": statistics.median(ratios) if rule == "mma" else 1.0,
            "peak_mb": memory[rule],
            "guard_share": statistics.median(guard / step for step, guard in seconds[rule]),
            "parameters": parameters,
        }
        for rule in RULES
    ]
    print(
        "| rule | seconds a step (median) | ratio to causal (median of pairs) | guard's share | peak MB | parameters |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for row in rows:
        form = "| {rule} | {seconds:.4f} | {ratio_to_causal:.3f} | {guard_share:.2%} | {peak_mb:.0f} | {parameters:,} |"
        print(form.format(**row))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
