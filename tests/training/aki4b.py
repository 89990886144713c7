"""The paper's recipes over fixture files, as their tests run them."""

from pathlib import Path

from fixtures.make import write_sources
from fixtures.make_shards import write_shards

PRETRAIN, SFT = "aki-4b/pretrain", "aki-4b/sft"
SHARDS = [
    "--pretrain.shards.0.urls",
    "kale/{000000..000003}.tar",
    "--pretrain.shards.1.urls",
    "ocr/{000000..000003}.tar",
]


def write_released(folder: Path) -> Path:
    """Fixtures of the eleven sources and of the shards, below one root."""
    write_sources(folder)
    return write_shards(folder)


def short(stage, root, output, *more, steps=6):
    """The arguments of a short run of a recipe with tiny parts; a step every thing that can happen."""
    every = ["--steps", steps, "--warmup-steps", 2, "--log-every", 1, "--save-every", 2]
    fields = [f"--{stage}.{word[2:]}" if isinstance(word, str) else str(word) for word in every]
    where = ["--root", str(root), "--cache", str(root / "cache"), "--output", str(output)]
    quick = ["--workers", "0", "--devices", "1", "--no-bf16"]
    shards = SHARDS if stage == "pretrain" else []
    recipe = PRETRAIN if stage == "pretrain" else SFT
    return ["train", recipe, "--tiny", *where, *fields, *quick, *shards, *map(str, more)]
