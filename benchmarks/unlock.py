"""Seconds a training step of a LLaVA, locked and unlocked, at the paper's lengths: 144 image and 512 text tokens.

Both take turns on the same weights and the same batches, so that a noisy machine disturbs both alike. Two batches: rows
of different lengths, padded, as in training (the stock model makes a mask as well), and rows of equal length, for which
the stock model needs no mask at all.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
from pathlib import Path

import torch
from torch import Tensor, nn
from train_step import now
from transformers import AutoConfig, AutoModelForImageTextToText

import aki

IMAGE_TOKENS, TEXT_TOKENS, ANSWER, ROWS = 144, 512, 64, 2
IMAGE_ID, VOCAB = 3, 4000


def build(layers: int, device: str) -> nn.Module:
    sizes = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": layers, "num_attention_heads": 12}
    vision = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AutoConfig.for_model(
        "llava",
        text_config={"model_type": "llama", "vocab_size": VOCAB, **sizes},
        vision_config={"model_type": "clip_vision_model", "image_size": 96, "patch_size": 8, **vision},
        image_token_index=IMAGE_ID,
    )
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(config).train().to(device)


def batch(lengths: list[int]) -> dict[str, Tensor]:
    """Rows of [image][question][answer] with so many text tokens, padded on the right."""
    ids = torch.randint(4, VOCAB, (ROWS, IMAGE_TOKENS + TEXT_TOKENS))
    ids[:, 1 : IMAGE_TOKENS + 1] = IMAGE_ID
    position, ends = torch.arange(ids.shape[1]), IMAGE_TOKENS + torch.tensor(lengths)[:, None]
    learned = (position >= ends - ANSWER) & (position < ends)
    return {
        "input_ids": ids,
        "attention_mask": (position < ends).long(),
        "labels": ids.masked_fill(~learned, -100),
        "pixel_values": torch.randn(ROWS, 3, 96, 96),
    }


BATCHES = {"padded": [TEXT_TOKENS, TEXT_TOKENS - 150], "equal lengths": [TEXT_TOKENS] * ROWS}


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: dict[str, Tensor]) -> float:
    started = now(inputs["input_ids"].device)
    model(**inputs).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return now(inputs["input_ids"].device) - started


def measure(steps: int, layers: int, device: str) -> dict[str, dict[str, float]]:
    model = build(layers, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    results = {}
    for name, lengths in BATCHES.items():
        seconds: dict[str, list[float]] = {"locked": [], "unlocked": []}
        for step in range(steps + 1):
            inputs = {name: values.to(device) for name, values in batch(lengths).items()}
            for way in ("locked", "unlocked") if step % 2 else ("unlocked", "locked"):
                getattr(aki, way.removesuffix("ed"))(model)
                taken = train_step(model, optimizer, inputs)
                if step > 0:
                    seconds[way].append(taken)
        medians = {way: statistics.median(taken) for way, taken in seconds.items()}
        results[name] = {**medians, "ratio": medians["unlocked"] / medians["locked"]}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two steps each of a model of one layer")
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--steps", type=int, default=30, help="each way and batch")
    options = parser.parse_args()
    logging.getLogger("aki").setLevel(logging.ERROR)
    results = measure(2, 1, options.device) if options.quick else measure(options.steps, 4, options.device)
    print(f"{'batch':<15} {'locked':>10} {'unlocked':>10} {'ratio':>7}")
    for name, row in results.items():
        print(f"{name:<15} {row['locked']:>8.3f} s {row['unlocked']:>8.3f} s {row['ratio']:>7.3f}")
    if options.json:
        options.json.write_text(json.dumps({"ratio": results["padded"]["ratio"], "batches": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
