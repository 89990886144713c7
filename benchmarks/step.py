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
from pathlib import Path
from tempfile import TemporaryDirectory

from aki.evaluation.plan import rows_by_rule
from aki.evaluation.steps import ratios, row_steps, take_turns
from aki.training.recipe import Recipe, load_recipe

RULES = ("causal", "mma")
RECIPE = "digits"


def recipe() -> Recipe:
    found = load_recipe(RECIPE)
    found.rows = rows_by_rule(RULES)
    return found


def peak_memory(rule: str, queue: multiprocessing.Queue) -> None:
    with TemporaryDirectory() as folder:
        (step,) = row_steps(recipe(), [rule], Path(folder)).values()
        for _ in range(4):
            step()
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
    with TemporaryDirectory() as folder:
        steps = row_steps(recipe(), RULES, Path(folder))
        taken = take_turns(steps, 10 if options.quick else 60)
    relative = ratios(taken, "causal")
    rows = [
        {
            "rule": rule,
            "seconds": statistics.median(seconds for seconds, _ in taken[rule]),
            "ratio_to_causal": relative[rule],
            "peak_mb": memory[rule],
            "guard_share": statistics.median(guard / seconds for seconds, guard in taken[rule]),
            "parameters": sum(parameter.numel() for parameter in steps[rule].model.parameters()),
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
