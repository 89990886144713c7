"""Whether torch.compile pays in a training step: seconds of the same packed step, eager and compiled, turn by turn.

The model and the step are those of train_step.py; each layer of the language model is compiled, attention by segments
as one operator in it. The ratio is the median over pairs of steps, so that a noisy machine disturbs both alike.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from train_step import DTYPES, batches, build, draw_samples, step_seconds


def measure(dtype_name: str, device: str, layers: int, steps: int, row_tokens: int) -> dict:
    dtype = DTYPES[dtype_name]
    torch.manual_seed(0)
    models = {way: build("100m", "segments", device, layers) for way in ("eager", "compiled")}
    models["compiled"].load_state_dict(models["eager"].state_dict())
    for layer in models["compiled"].model.language_model.layers:
        layer.compile(dynamic=True)
    optimizers = {way: torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True) for way, model in models.items()}
    batch = next(batches("packed", draw_samples(row_tokens // 200, seed=0), 1, row_tokens))
    started = time.perf_counter()
    step_seconds(models["compiled"], optimizers["compiled"], batch, dtype)
    compiling = time.perf_counter() - started
    taken: dict[str, list[float]] = {way: [] for way in models}
    for step in range(steps + 1):
        for way, model in models.items():
            seconds = step_seconds(model, optimizers[way], batch, dtype)
            if step > 0:
                taken[way].append(seconds)
    ratios = [compiled / eager for eager, compiled in zip(taken["eager"], taken["compiled"], strict=True)]
    best = {f"{way}_s": min(seconds) for way, seconds in taken.items()}
    return {"dtype": dtype_name, **best, "ratio": statistics.median(ratios), "first_step_s": compiling}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two layers, float32 only")
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--row-tokens", type=int, default=2048)
    options = parser.parse_args()
    if options.quick:
        options.layers, options.row_tokens, options.steps = 2, 1024, 4
    rows = []
    print("| dtype | eager, s | compiled, s | compiled / eager (median of pairs) | first compiled step, s |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for dtype_name in ("float32",) if options.quick else DTYPES:
        row = measure(dtype_name, options.device, options.layers, options.steps, options.row_tokens)
        rows.append(row)
        form = "| {dtype} | {eager_s:.3f} | {compiled_s:.3f} | {ratio:.3f} | {first_step_s:.1f} |"
        print(form.format(**row), flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
