"""Samples a second of a training step, in three ways of batching, and the share of the machine's GEMM rate it reaches.

An AKI on samples with the paper's lengths: 144 embeddings a picture, and text of a log-normal length with median 45 and
95th percentile 160, capped at 512; the last third of the text is the answer. The step is the trainer's: leak guard,
frozen vision encoder, output layer on supervised positions, clipping, fused AdamW. `authors` is how the authors batch:
every sample padded to 656 tokens, a dense mask, logits of all positions.

Sizes: `100m`, for a CPU, nearly all in the language model; `aki-4b`, the paper's own with random weights in bfloat16,
for a GPU; `tiny`, to rehearse that one.

Every batch is taken by both rules in turn, and counts with its best time over the rounds, so that a machine with other
work disturbs all alike.

The GEMM share counts the multiplications of real tokens' matrices (forward once, backward twice; the frozen encoder
forward alone), not those spent on padding, on recomputation or in attention, against the rate of square products in
the same run and dtype.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, SiglipVisionConfig

from aki import AkiConfig, AkiForConditionalGeneration
from aki.data.packing import PackedCollator, Row, first_fit_decreasing, join
from aki.layout import IGNORE_INDEX, moved
from aki.training.model import model_config, tiny
from aki.training.recipe import load_recipe
from aki.training.trainer import check_layout, layout_of, supervised_positions

PICTURE, TEXT_CAP, PADDED = 144, 512, 656
MEDIAN, PERCENTILE_95 = 45, 160
VOCABULARY, IMAGE = 32_000, 31_999
BATCHINGS = ("authors", "padded", "packed")
RULES = ("causal", "mma")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Size:
    """
    Attributes:
        batch: samples a padded batch.
        row_tokens: tokens a packed row.
        checkpointing: without and with gradient checkpointing.
        weights: their dtype; where it is float32, a lower one is autocast's.
    """

    samples: int
    batch: int
    row_tokens: int
    checkpointing: tuple[bool, ...] = (False,)
    weights: torch.dtype = torch.float32


SIZES = {
    "100m": Size(24, 8, 4096),
    "aki-4b": Size(48, 8, 4096, (False, True), torch.bfloat16),
    "tiny": Size(6, 3, 1024, (False, True), torch.bfloat16),
}


def config_of(size: str, layers: int) -> AkiConfig:
    if size != "100m":
        recipe = load_recipe("aki-4b/sft")
        config = model_config((recipe if size == "aki-4b" else tiny(recipe)).model)
        config.image_token_id = IMAGE
        return config
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=640,
        intermediate_size=1920,
        num_hidden_layers=layers,
        num_attention_heads=10,
        num_key_value_heads=10,
        max_position_embeddings=4096,
    )
    vision = SiglipVisionConfig(
        image_size=96, patch_size=8, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1
    )
    return AkiConfig(
        vision_config=vision.to_dict(), text_config=text, connector_config={"connector": "mlp"}, image_token_id=IMAGE
    )


def build(size: str = "100m", attention: str = "auto", device: str = "cpu", layers: int = 10):
    config, torch_device = config_of(size, layers), torch.device(device)
    with torch_device:
        model = AkiForConditionalGeneration._from_config(
            config, attn_implementation={"text_config": attention}, dtype=SIZES[size].weights
        )
    model.model.vision_encoder.requires_grad_(False)
    return model.train()


def draw_samples(number: int, seed: int, image_size: tuple[int, int] = (96, 96)) -> list[Row]:
    generator = torch.Generator().manual_seed(seed)
    # The normal distribution's 95th percentile is 1.645 deviations above its median.
    deviation = math.log(PERCENTILE_95 / MEDIAN) / 1.645
    lengths = torch.randn(number, generator=generator).mul(deviation).exp().mul(MEDIAN).round().clamp(6, TEXT_CAP)
    return [_sample(int(length), image_size, generator) for length in lengths]


def _sample(text: int, image_size: tuple[int, int], generator: torch.Generator) -> Row:
    ids = torch.randint(10, 30_000, (1, PICTURE + text), generator=generator)
    ids[:, :PICTURE] = IMAGE
    answer = PICTURE + text - max(2, text // 3)
    labels, blocks = ids.clone(), torch.zeros_like(ids)
    labels[:, :answer], blocks[:, answer:] = IGNORE_INDEX, -1
    pixels = torch.randn(1, 3, *image_size, generator=generator)
    return {"input_ids": ids, "labels": labels, "prompt_block_ids": blocks, "pixel_values": pixels}


def pad(samples: list[Row], length: int) -> Row:
    fill = {"input_ids": 0, "labels": IGNORE_INDEX, "prompt_block_ids": -1}
    batch = {
        name: torch.cat(
            [torch.nn.functional.pad(s[name], (0, length - s[name].shape[1]), value=value) for s in samples]
        )
        for name, value in fill.items()
    }
    lengths = torch.tensor([sample["input_ids"].shape[1] for sample in samples])
    batch["attention_mask"] = (torch.arange(length) < lengths[:, None]).long()
    return batch | {"pixel_values": torch.cat([sample["pixel_values"] for sample in samples])}


def batches(batching: str, samples: list[Row], size: int, row_tokens: int) -> Iterator[Row]:
    """Batches of `size` padded samples, or of one packed row each."""
    if batching == "packed":
        lengths = [sample["input_ids"].shape[1] for sample in samples]
        collate = PackedCollator(pad_token_id=0)
        for items in first_fit_decreasing(lengths, row_tokens):
            yield collate([join([samples[item] for item in items])])
        return
    for start in range(0, len(samples), size):
        chosen = samples[start : start + size]
        longest = max(sample["input_ids"].shape[1] for sample in chosen)
        yield pad(chosen, PADDED if batching == "authors" else longest)


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def step_seconds(
    model: AkiForConditionalGeneration, optimizer: torch.optim.Optimizer, batch: Row, dtype, all_logits: bool = False
) -> float:
    device = model.device
    started = now(device)
    layout = layout_of(model, batch)
    check_layout(model, batch, layout)
    kept = {} if all_logits else {"logits_to_keep": supervised_positions(batch["labels"])}
    given = {name: moved(x, device) for name, x in (batch | kept).items()}
    lowered = dtype != torch.float32 and model.dtype == torch.float32
    with torch.autocast(device.type, dtype) if lowered else nullcontext():
        loss = model(**given, layout=layout).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return now(device) - started


def gemm_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Floating-point operations a second in the best of a few square products."""
    size = 8192 if device.type == "cuda" else 2048
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = math.inf
    for _ in range(6):
        started = now(device)
        left @ right
        best = min(best, now(device) - started)
    return 2 * size**3 / best


def useful_operations(model: AkiForConditionalGeneration, samples: list[Row]) -> float:
    """Of a step over real tokens: layers on all of them, the output layer where something is learned, the connector on
    a picture's embeddings, the encoder on its patches."""
    layers, encoder = (
        sum(p.numel() for name, p in part.named_parameters() if p.ndim == 2 and ".layers." in f".{name}")
        for part in (model.model.language_model, model.model.vision_encoder)
    )
    head = sum(p.numel() for p in model.get_output_embeddings().parameters())
    connector = sum(p.numel() for p in model.model.connector.parameters() if p.ndim == 2)
    tokens = sum(sample["input_ids"].shape[1] for sample in samples)
    learned = sum(int((sample["labels"][:, 1:] != IGNORE_INDEX).sum()) for sample in samples)
    of_pictures = 6.0 * connector * PICTURE + 2.0 * encoder * model.config.num_patches
    return 6.0 * (layers * tokens + head * learned) + of_pictures * len(samples)


@dataclass
class Taken:
    """What the batches of one combination took: best seconds of each, and the highest memory in bytes."""

    seconds: list[float]
    peak: int = 0


def measure(dtype_name: str, options: argparse.Namespace) -> list[dict]:
    """Rows of all combinations; what does not fit into memory does no samples a second."""
    size, dtype, device = SIZES[options.size], DTYPES[dtype_name], torch.device(options.device)
    torch.manual_seed(0)
    model = build(options.size, "auto", options.device)
    samples = draw_samples(options.samples or size.samples, 0, model.config.image_size)
    made = {way: list(batches(way, samples, size.batch, options.row_tokens or size.row_tokens)) for way in BATCHINGS}
    taken = take_turns(model, made, size.checkpointing, dtype, options.rounds)
    rate, operations = gemm_rate(dtype, device), useful_operations(model, samples)
    tokens = sum(sample["input_ids"].shape[1] for sample in samples)
    rows = []
    for (batching, checkpointing, rule), of in taken.items():
        seconds, causal = sum(of.seconds), sum(taken[batching, checkpointing, "causal"].seconds)
        rows.append(
            {
                "size": options.size,
                "batching": batching,
                "checkpointing": checkpointing,
                "rule": rule,
                "dtype": dtype_name,
                "samples_per_s": len(samples) / seconds,
                "tokens_per_s": tokens / seconds,
                "gemm_share": operations / seconds / rate,
                "ratio_to_causal": seconds / causal if math.isfinite(seconds) else None,
                "peak_gb": of.peak / 2**30 if device.type == "cuda" else None,
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
            }
        )
    return rows


def take_turns(
    model, made: dict[str, list[Row]], checkpointing: tuple[bool, ...], dtype: torch.dtype, rounds: int
) -> dict[tuple[str, bool, str], Taken]:
    """By batching, checkpointing and rule."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    step_seconds(model, optimizer, made["padded"][0], dtype)  # the optimizer's state is there from now on
    ways = [(batching, kept) for batching in made for kept in checkpointing]
    taken = {(*way, rule): Taken([math.inf] * len(made[way[0]])) for way in ways for rule in RULES}
    for turn in range(rounds):
        for batching, kept in ways:
            set_way(model, batching, kept)
            for number, batch in enumerate(made[batching]):
                for rule in RULES if (number + turn) % 2 else RULES[::-1]:
                    model.config.attention_rule = rule
                    seconds, peak = tried(model, optimizer, batch, dtype, batching == "authors")
                    of = taken[batching, kept, rule]
                    of.seconds[number], of.peak = min(of.seconds[number], seconds), max(of.peak, peak)
            print(f"round {turn + 1} of {rounds}: {batching}, {number + 1} batches", file=sys.stderr, flush=True)
    return taken


def set_way(model: AkiForConditionalGeneration, batching: str, checkpointing: bool) -> None:
    model.set_attn_implementation({"text_config": "sdpa" if batching == "authors" else "auto"})
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    elif model.is_gradient_checkpointing:
        model.gradient_checkpointing_disable()


def tried(model, optimizer, batch: Row, dtype: torch.dtype, all_logits: bool) -> tuple[float, int]:
    """Seconds and peak bytes of a step; infinite seconds where it does not fit."""
    cuda = model.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    try:
        seconds = step_seconds(model, optimizer, batch, dtype, all_logits)
    except torch.OutOfMemoryError:
        optimizer.zero_grad()
        torch.cuda.empty_cache()
        seconds = math.inf
    return seconds, torch.cuda.max_memory_allocated() if cuda else 0


def print_profile(options: argparse.Namespace) -> None:
    """Where the time of one packed MMA step goes."""
    size, dtype = SIZES[options.size], DTYPES[options.dtypes[0]]
    model = build(options.size, "auto", options.device)
    model.config.attention_rule = "mma"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    samples = draw_samples(options.samples or size.samples, 0, model.config.image_size)
    batch = next(batches("packed", samples, size.batch, options.row_tokens or size.row_tokens))
    step_seconds(model, optimizer, batch, dtype)
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if options.device == "cuda" else []
    with torch.profiler.profile(activities=kinds) as recorded:
        step_seconds(model, optimizer, batch, dtype)
    print(f"{batch['input_ids'].shape[1]} tokens")
    by = f"self_{options.device}_time_total"
    print(recorded.key_averages().table(sort_by=by, row_limit=15, max_name_column_width=50))


def print_table(rows: list[dict]) -> None:
    first = next(row["samples_per_s"] for row in rows if row["rule"] == "mma" and row["batching"] == "authors")
    titles = ["dtype", "batching", "checkpointing", "rule", "samples/s", "times authors (MMA)", "tokens/s"]
    titles += ["MMA / causal time", "GEMM share", "peak GB"]
    print(f"| {' | '.join(titles)} |\n| --- | --- | --- | --- |{' ---: |' * 6}")
    for row in rows:
        cells = [row["dtype"], row["batching"], "yes" if row["checkpointing"] else "no", row["rule"]]
        if row["samples_per_s"] == 0:
            cells += ["does not fit into memory", *[""] * 5]
        else:
            times = "" if first == 0 else f"{row['samples_per_s'] / first:.2f}"
            cells += [f"{row['samples_per_s']:.2f}", times, f"{row['tokens_per_s']:.0f}"]
            cells += [f"{row['ratio_to_causal']:.3f}", f"{row['gemm_share']:.2f}"]
            cells += ["" if row["peak_gb"] is None else f"{row['peak_gb']:.1f}"]
        print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="100m")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="the tiny size, once")
    parser.add_argument("--profile", action="store_true", help="instead, where the time of one packed step goes")
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="float32 unless the size has bfloat16 weights")
    parser.add_argument("--samples", type=int)
    parser.add_argument("--row-tokens", type=int, help="tokens a packed row")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    if options.quick:
        options.size, options.rounds = "tiny", 1
    options.dtypes = options.dtypes or ["float32" if SIZES[options.size].weights == torch.float32 else "bfloat16"]
    if options.profile:
        print_profile(options)
        return
    rows: list[dict] = []
    for dtype_name in options.dtypes:
        measured = measure(dtype_name, options)
        print_table(measured)
        rows += measured
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
