"""Samples a second of a training step, padded and packed, and the share of the machine's GEMM rate that it reaches.

A 100 M-parameter AKI on samples with the paper's lengths: 144 embeddings a picture, and text of a log-normal length
with median 45 and 95th percentile 160, capped at 512; the last third of the text is the answer. The step is the
trainer's: leak guard, frozen vision encoder, output layer on supervised positions, clipping, fused AdamW.

Every batch is taken by both rules in turn, and counts with its best time over the rounds, so that a machine with other
work disturbs all alike.

The GEMM share counts the multiplications of real tokens' matrices (forward once, backward twice), not those spent on
padding and not attention's, against the rate of square products in the same run and dtype.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from transformers import LlamaConfig, SiglipVisionConfig

from aki import AkiConfig, AkiForConditionalGeneration
from aki.data.packing import PackedCollator, Row, first_fit_decreasing, join
from aki.layout import IGNORE_INDEX
from aki.training.trainer import guard_batch, supervised_positions

PICTURE, TEXT_CAP, PADDED = 144, 512, 656
MEDIAN, PERCENTILE_95 = 45, 160
VOCABULARY, IMAGE = 32_000, 31_999
BATCHINGS = ("padded_656", "padded_longest", "packed")
RULES = ("causal", "mma")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def build(attention: str, layers: int) -> AkiForConditionalGeneration:
    """About 100 M parameters, nearly all in the language model: the encoder is small, because it is not measured."""
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
    config = AkiConfig(
        vision_config=vision.to_dict(), text_config=text, connector_config={"connector": "mlp"}, image_token_id=IMAGE
    )
    model = AkiForConditionalGeneration._from_config(config, attn_implementation={"text_config": attention})
    model.model.vision_encoder.requires_grad_(False)
    return model.train()


def draw_samples(number: int, seed: int) -> list[Row]:
    generator = torch.Generator().manual_seed(seed)
    # The normal distribution's 95th percentile is 1.645 deviations above its median.
    deviation = math.log(PERCENTILE_95 / MEDIAN) / 1.645
    lengths = torch.randn(number, generator=generator).mul(deviation).exp().mul(MEDIAN).round().clamp(6, TEXT_CAP)
    return [_sample(int(length), generator) for length in lengths]


def _sample(text: int, generator: torch.Generator) -> Row:
    ids = torch.randint(10, 30_000, (1, PICTURE + text), generator=generator)
    ids[:, :PICTURE] = IMAGE
    answer = PICTURE + text - max(2, text // 3)
    labels, blocks = ids.clone(), torch.zeros_like(ids)
    labels[:, :answer], blocks[:, answer:] = IGNORE_INDEX, -1
    pixels = torch.randn(1, 3, 96, 96, generator=generator)
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
        yield pad(chosen, PADDED if batching == "padded_656" else longest)


def step_seconds(model: AkiForConditionalGeneration, optimizer: torch.optim.Optimizer, batch: Row, dtype) -> float:
    started = time.perf_counter()
    guard_batch(model, batch)
    lower = torch.autocast("cpu", dtype) if dtype != torch.float32 else nullcontext()
    with lower:
        loss = model(**batch, logits_to_keep=supervised_positions(batch["labels"])).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - started


def gemm_rate(dtype: torch.dtype, size: int = 2048) -> float:
    """Floating-point operations a second in the best of a few square products."""
    left, right = (torch.randn(size, size).to(dtype) for _ in range(2))
    best = math.inf
    for _ in range(6):
        started = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def useful_operations(model: AkiForConditionalGeneration, samples: list[Row]) -> float:
    """Of forward and backward over real tokens: layers on all of them, the output layer where something is learned."""
    layers = sum(p.numel() for n, p in model.model.language_model.named_parameters() if p.ndim == 2 and ".layers." in n)
    head = sum(p.numel() for p in model.get_output_embeddings().parameters())
    connector = sum(p.numel() for p in model.model.connector.parameters() if p.ndim == 2)
    tokens = sum(sample["input_ids"].shape[1] for sample in samples)
    learned = sum(int((sample["labels"][:, 1:] != IGNORE_INDEX).sum()) for sample in samples)
    return 6.0 * (layers * tokens + head * learned + connector * PICTURE * len(samples))


def measure(dtype_name: str, options: argparse.Namespace) -> list[dict]:
    dtype = DTYPES[dtype_name]
    torch.manual_seed(0)
    model = build(options.attention, options.layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    samples = draw_samples(options.samples, seed=0)
    taken: dict[tuple[str, str], list[float]] = {}
    peak = 0.0
    warm = next(batches("packed", samples, options.batch, options.row_tokens))
    step_seconds(model, optimizer, warm, dtype)
    for round_number in range(options.rounds):
        peak = max(peak, gemm_rate(dtype))
        for batching in BATCHINGS:
            made = list(batches(batching, samples, options.batch, options.row_tokens))
            for number, batch in enumerate(made):
                for rule in RULES if (number + round_number) % 2 else RULES[::-1]:
                    model.config.attention_rule = rule
                    best = taken.setdefault((batching, rule), [math.inf] * len(made))
                    best[number] = min(best[number], step_seconds(model, optimizer, batch, dtype))
            done = f"{dtype_name}, round {round_number + 1} of {options.rounds}: {batching}, {len(made)} batches"
            print(done, file=sys.stderr, flush=True)
    seconds = {combination: sum(best) for combination, best in taken.items()}
    operations = useful_operations(model, samples)
    return [
        {
            "batching": batching,
            "rule": rule,
            "dtype": dtype_name,
            "samples_per_s": len(samples) / seconds[batching, rule],
            "gemm_share": operations / seconds[batching, rule] / peak,
            "ratio_to_causal": seconds[batching, rule] / seconds[batching, "causal"],
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
        }
        for batching in BATCHINGS
        for rule in RULES
    ]


def print_profile(options: argparse.Namespace) -> None:
    """Where the time of one packed MMA step goes, in float32."""
    model = build(options.attention, options.layers)
    model.config.attention_rule = "mma"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    batch = next(batches("packed", draw_samples(options.samples, seed=0), options.batch, options.row_tokens))
    step_seconds(model, optimizer, batch, torch.float32)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        step_seconds(model, optimizer, batch, torch.float32)
    print(f"{batch['input_ids'].shape[1]} tokens")
    print(recorded.key_averages().table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=50))


def print_table(rows: list[dict]) -> None:
    first = next(row["samples_per_s"] for row in rows if row["rule"] == "mma" and row["batching"] == "padded_656")
    print("| dtype | batching | rule | samples a second | times padded_656 (MMA) | MMA / causal time | GEMM share |")
    print("| --- | --- | --- | ---: | ---: | ---: | ---: |")
    for row in rows:
        times = row["samples_per_s"] / first
        print(
            f"| {row['dtype']} | {row['batching']} | {row['rule']} | {row['samples_per_s']:.2f} | {times:.2f} | "
            f"{row['ratio_to_causal']:.3f} | {row['gemm_share']:.2f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two layers, few samples")
    parser.add_argument("--profile", action="store_true", help="instead, where the time of one packed step goes")
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    parser.add_argument("--attention", default="auto", help="attn_implementation of the language model")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32"])
    parser.add_argument("--layers", type=int, default=10, help="of the language model; 10 make 100 M parameters")
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--batch", type=int, default=8, help="samples a padded batch")
    parser.add_argument("--row-tokens", type=int, default=4096, help="tokens a packed row")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    if options.quick:
        options.samples, options.rounds, options.batch, options.row_tokens, options.layers = 6, 1, 3, 1024, 2
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
