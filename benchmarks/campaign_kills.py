"""Training runs that are killed at random moments, and checkpoints that are damaged: a part of the campaign.

    python benchmarks/campaign_kills.py --tries 20

A kill is a SIGKILL in one of the windows of a run: its steps, a checkpoint, scoring, saving weights, writing the
result. The run is then resumed until it is done; its weights and losses must be those of one that nobody killed, to the
bit. A damage is a flipped bit, a cut file or a missing one in the newest checkpoint of a killed run; resumed, the run
must name it, go on from the one before, and end as if nothing had been.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from aki.files import checksum
from aki.training.recipe import Recipe, load_recipe

RECIPE = "digits"
STEPS, SAVE_EVERY = 12, 4
WINDOWS = ("steps", "checkpoint", "scoring", "weights", "result")
DAMAGES = ("flip", "cut", "miss")


def tiny() -> Recipe:
    """The digits recipe with tiny parts and a few steps of packed rows, an endless stream as own data are."""
    recipe = load_recipe(RECIPE)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    recipe.model.vision |= small
    recipe.model.text |= {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    recipe.data.eval_size, recipe.data.test_size, recipe.workers = 12, 12, 0
    sft = replace(
        recipe.stage("sft"), steps=STEPS, save_every=SAVE_EVERY, log_every=3, warmup_steps=2, packing=True, batch_size=1
    )
    return replace(recipe, pretrain=None, sft=sft)


def child(folder: Path, window: str, delay: float) -> None:
    """Train, and say when a window begins by killing this process a moment later."""
    from threading import Timer

    from aki.training import stages, trainer

    def then_killed(room: object, name: str, at: int) -> None:
        original = getattr(room, name)
        calls: list[None] = []

        def wrapped(*args, **kwargs):
            calls.append(None)
            if len(calls) == at:
                if delay:
                    Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
                else:
                    os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(room, name, wrapped)

    rng = random.Random(delay)
    places: dict[str, tuple[object, str, int]] = {
        "steps": (trainer.AkiTrainer, "training_step", rng.randint(1, 3)),
        "checkpoint": (trainer.AkiTrainer, "_save_checkpoint", 1),
        "scoring": (stages, "_score", rng.randint(1, 3)),
        "weights": (stages, "_save", 1),
        "result": (stages, "sealed_weights", 1),
    }
    if window in places:
        then_killed(*places[window])
    stages.run_stage(stages.Job(tiny(), "sft", folder, resume=True, report=lambda news: None))


def train(folder: Path, window: str = "none", delay: float = 0.0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, __file__, "--child", str(folder), window, str(delay)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def outcome(folder: Path) -> tuple[object, ...]:
    """What must not depend on kills."""
    result = json.loads((folder / "result.json").read_text())
    return checksum(folder / "model.safetensors"), result["losses"], result["test"], result["validation"]


def killed_once(folder: Path, rng: random.Random, whole: tuple[object, ...]) -> str | None:
    """Kill a run in one to three windows; what is wrong after it was resumed, or None."""
    said = ""
    for window in rng.choices(WINDOWS, k=rng.randint(1, 3)):
        delay = rng.choice((0.0, rng.uniform(0.001, 0.3)))
        done = train(folder, window, delay)
        said += f" {window}+{delay:.3f}s({done.returncode})"
        if done.returncode not in (0, -signal.SIGKILL):
            return f"kill{said}: {done.stderr[-300:]}"
    return _resumed(folder, f"kill{said}", whole)


def damaged_once(folder: Path, rng: random.Random, whole: tuple[object, ...]) -> str | None:
    """Damage a file of the newest of two checkpoints of a killed run."""
    train(folder, "weights")
    newest = folder / f"training/checkpoint-{STEPS}"
    victim = rng.choice(sorted(path for path in newest.iterdir() if path.name != "WHOLE"))
    how = rng.choice(DAMAGES)
    damage(victim, how, rng)
    done = train(folder)
    label = f"damage {how} {victim.name}"
    if str(victim) not in done.stderr or "going on from" not in done.stderr:
        return f"{label}: it was not named: {done.stderr[-300:]}"
    return _resumed(folder, label, whole)


def damage(path: Path, how: str, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if how == "miss":
        path.unlink()
    elif how == "cut":
        path.write_bytes(content[: rng.randrange(len(content))])
    else:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)


def _resumed(folder: Path, label: str, whole: tuple[object, ...]) -> str | None:
    done = train(folder)
    if done.returncode:
        return f"{label}: resuming ended with {done.returncode}: {done.stderr[-300:]}"
    return None if outcome(folder) == whole else f"{label}: other weights, losses or scores"


def run(seed: int, tries: int) -> tuple[int, list[str]]:
    """Half of the tries kill, half damage.

    Returns:
        The tries, and a sentence each for those that failed.
    """
    rng, failures = random.Random(seed), []
    with TemporaryDirectory() as place:
        train(Path(place) / "whole")
        whole = outcome(Path(place) / "whole")
        for number in range(tries):
            folder = Path(place) / "run"
            once: Callable[..., str | None] = damaged_once if number % 2 else killed_once
            failed = once(folder, rng, whole)
            failures += [] if failed is None else [f"{number}: {failed}"]
            shutil.rmtree(folder)
    return tries, failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        child(Path(asked.child[0]), asked.child[1], float(asked.child[2]))
        return
    started = time.time()
    tries, failures = run(asked.seed, asked.tries)
    print(*failures, f"{tries} tries, {len(failures)} failures, {time.time() - started:.0f} s", sep="\n")


if __name__ == "__main__":
    main()
