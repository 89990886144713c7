"""Samples that one core makes ready for training, against decoding and resizing their pictures alone.

640 x 480 JPEGs, one question and answer each: read, decoded, resized to 384 x 384, tokenised in the paper's prompt, and
put into batches of 4, by the code that trains (which normalises the bytes on the model's device). The floor is Pillow's
decoding and resizing of the same files. All ways take turns in one process on one thread; each figure is the median
turn's, in seconds of processor time, so that it tells what a core of its own gives, whatever else the machine does.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from aki.data.collate import ChatCollator
from aki.data.feed import Feed
from aki.data.mixture import Mixture, mixture_weights
from aki.data.schema import Sample, assistant, user
from aki.data.tokenizer import train_tokenizer
from aki.models import AkiProcessor
from aki.models.templates import AKI, END_TOKEN, SYSTEM_MESSAGE

WIDTH, HEIGHT, SIDE, BATCH = 640, 480, 384, 4
QUESTION = "Answer the question using a single word or phrase. What is the man in the blue jacket holding?"
FLOOR, OURS, THEIRS = "Pillow decode + resize", "training's path", "with transformers' image processor"


class Pictures:
    """One question about each picture."""

    name = "pictures"

    def __init__(self, paths: list[Path]):
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def sample(self, index: int, epoch: int) -> Sample:
        return Sample([user(str(self.paths[index]), QUESTION), assistant("an umbrella")], self.name, str(index))


def write_pictures(folder: Path, size: int) -> list[Path]:
    """Smooth shapes with some noise: about 100 kB each, as COCO's."""
    rng = np.random.default_rng(0)
    paths = [folder / f"{number}.jpg" for number in range(size)]
    for path in paths:
        coarse = Image.fromarray(rng.integers(0, 256, (HEIGHT // 16, WIDTH // 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), dtype=np.int16)
        noisy = smooth + rng.integers(-12, 13, smooth.shape)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return paths


def make_ways(paths: list[Path]) -> dict[str, Callable[[int], object]]:
    """Name -> a function that makes the batch of that number."""
    tokenizer = train_tokenizer([QUESTION, SYSTEM_MESSAGE], bos_token="<s>", more=(END_TOKEN,))
    images = SiglipImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=3
    )
    processor = AkiProcessor(images, tokenizer, 144, chat_template=AKI)
    mixture = Mixture([Pictures(paths)], mixture_weights("uniform", [1], None), 0)

    def floor(number: int) -> object:
        chosen = [paths[mixture.draw(number * BATCH + i)[1]] for i in range(BATCH)]
        return [Image.open(path).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC) for path in chosen]

    ours = Feed(mixture, [ChatCollator(processor, 655, raw_pixels=True)], BATCH)
    theirs = Feed(mixture, [ChatCollator(processor, 655)], BATCH)
    theirs.collators[0].fast = None
    return {FLOOR: floor, OURS: ours.chunk, THEIRS: theirs.chunk}


def measure(ways: dict[str, Callable[[int], object]], rounds: int, batches: int) -> dict[str, float]:
    """Samples a second of each way."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, make in ways.items():
            started = time.process_time()
            for batch in range(batches):
                make(turn * batches + batch)
            seconds[name].append(time.process_time() - started)
    # The first turn warms up.
    return {name: batches * BATCH / statistics.median(all_of[1:]) for name, all_of in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few seconds")
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as the command does
    with tempfile.TemporaryDirectory() as folder:
        ways = make_ways(write_pictures(Path(folder), 32))
        speeds = measure(ways, *((9, 4) if arguments.quick else (41, 10)))
    print("| way | samples/s a core | of the floor |\n| --- | --- | --- |")
    for name, speed in speeds.items():
        print(f"| {name} | {speed:.0f} | {speed / speeds[FLOOR]:.2f} |")
    if arguments.json:
        numbers = {
            "samples_per_s_core": speeds[OURS],
            "floor_per_s_core": speeds[FLOOR],
            "ratio": speeds[OURS] / speeds[FLOOR],
            "image_processor_per_s_core": speeds[THEIRS],
        }
        arguments.json.write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
