"""Time and peak memory of attention backends, as ratios to causal attention in the same run.

One sample a length: 9/16 of it pictures, then a prompt of 1/8, then the answer, which is where the paper's long inputs
stand; 8 heads of 64. The backends take turns, and each keeps its best time, so that a noisy machine disturbs all alike.
The row `auto` repeats that of the backend which auto takes.
Peak memory is what the allocator held beyond inputs at its highest, from torch's profiler.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

from aki.attention import dense_mask, get_rule
from aki.attention.choice import choose
from aki.attention.flex import block_mask, compiled_for_cpu
from aki.attention.merged import merged_attention
from aki.attention.rectangles import Part, allowed_pairs, encode_plan, plan_parts
from aki.layout import IMAGE, SequenceLayout

HEADS, WIDTH = 8, 64
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
QUICK_LENGTHS = (512, 1024, 2048)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PASSES = ("forward", "backward", "both")
RULE = get_rule("mma")
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def one_turn(length: int) -> SequenceLayout:
    """Pictures, a prompt, an answer."""
    position = torch.arange(length)[None]
    pictures, prompt = length * 9 // 16, length * 9 // 16 + length // 8
    is_media = (position < pictures).long()
    return SequenceLayout(torch.zeros_like(position), is_media * IMAGE, is_media - 1, -(position >= prompt).long())


def parts_of(layout: SequenceLayout) -> list[Part]:
    assert RULE.rectangles is not None
    return plan_parts(layout, RULE.rectangles(layout))


def backends(layout: SequenceLayout, names: list[str]) -> dict[str, Attention]:
    plan = encode_plan(parts_of(layout))

    def merged(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return merged_attention(query, key, value, plan, WIDTH**-0.5)

    made: dict[str, Attention] = {
        "causal": lambda query, key, value: scaled_dot_product_attention(query, key, value, is_causal=True),
        "merged": merged,
    }
    if "dense" in names:
        mask = dense_mask(RULE, layout)[:, None]
        made["dense"] = lambda query, key, value: scaled_dot_product_attention(query, key, value, attn_mask=mask)
    if "flex" in names:
        blocks, compiled = block_mask(RULE, layout), compiled_for_cpu()
        # It refuses tensors that want gradients, even where none are asked for.
        made["flex"] = lambda query, key, value: compiled(
            query.detach(), key.detach(), value.detach(), block_mask=blocks
        )
    return {name: made[name] for name in names}


def inputs(length: int, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, length, HEADS, WIDTH, dtype=dtype).transpose(1, 2).requires_grad_() for _ in range(3)]


def seconds(attention: Attention, tensors: list[Tensor], with_backward: bool) -> dict[str, float]:
    with torch.set_grad_enabled(with_backward):
        start = time.perf_counter()
        out = attention(*tensors)
        middle = time.perf_counter()
    if not with_backward:
        return {"forward": middle - start}
    torch.autograd.grad(out, tensors, torch.ones_like(out))
    end = time.perf_counter()
    return {"forward": middle - start, "backward": end - middle, "both": end - start}


def best_seconds(functions: dict[str, Attention], tensors: list[Tensor], budget: float) -> dict[str, dict[str, float]]:
    """The best of as many rounds as fit in `budget` seconds, two at least: the first one warms up and compiles."""
    best: dict[str, dict[str, float]] = {name: {} for name in functions}
    started, rounds = time.perf_counter(), 0
    while rounds < 2 or time.perf_counter() - started < budget:
        for name, attention in functions.items():
            taken = seconds(attention, tensors, name != "flex")
            best[name] = {step: min(value, best[name].get(step, value)) for step, value in taken.items()}
        rounds += 1
    return best


def peak_megabytes(name: str, layout: SequenceLayout, tensors: list[Tensor]) -> float:
    """Masks and plans are made anew, so that they count."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        seconds(backends(layout, [name])[name], tensors, name != "flex")
    assert recorded.profiler is not None
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / 2**20


def measure(length: int, dtype_name: str, names: list[str], budget: float) -> list[dict]:
    """Rows of the backends, and of what `auto` would take of them."""
    dtype, layout = DTYPES[dtype_name], one_turn(length)
    parts = parts_of(layout)
    functions, tensors = backends(layout, names), inputs(length, dtype)
    best = best_seconds(functions, tensors, budget)
    # The profiler starts threads of its own: memory comes after time.
    peaks = {name: peak_megabytes(name, layout, tensors) for name in names}
    pairs = allowed_pairs(parts) / (length * (length + 1) / 2)
    taken_by_auto = choose("auto", RULE, (1, length), parts, device=torch.device("cpu"), dtype=dtype, heads=HEADS)
    sources = {name: name for name in names} | {"auto": taken_by_auto.backend}
    return [
        {
            "length": length,
            "dtype": dtype_name,
            "backend": name,
            "pass": step,
            "seconds": taken,
            "ratio_to_causal": taken / best["causal"][step],
            "pair_ratio": 1.0 if name == "causal" else pairs,
            "peak_mb": peaks[source],
        }
        for name, source in sources.items()
        for step, taken in best[source].items()
    ]


def print_table(rows: list[dict], dtype_name: str) -> None:
    print(
        f"\n{dtype_name}, {torch.get_num_threads()} threads: time as a ratio to causal attention, peak memory in MB\n"
    )
    print("| length | backend | forward | backward | both | allowed pairs | causal, s | peak MB |")
    print("| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    of_dtype = [row for row in rows if row["dtype"] == dtype_name]
    for length, name in dict.fromkeys((row["length"], row["backend"]) for row in of_dtype):
        own = {row["pass"]: row for row in of_dtype if (row["length"], row["backend"]) == (length, name)}
        ratios = " | ".join(f"{own[step]['ratio_to_causal']:.2f}" if step in own else "" for step in PASSES)
        one = own["forward"]
        taken = f"{own['both']['seconds']:.4f}" if name == "causal" else ""
        print(
            f"| {length} | {name} | {ratios} | {one['pair_ratio']:.2f} | {taken} | {one['peak_mb']:.1f} |", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three lengths, flex at the first only, within a minute")
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--seconds", type=float, default=12.0, help="time to spend on each length and dtype")
    options = parser.parse_args()
    lengths = QUICK_LENGTHS if options.quick else options.lengths
    budget = 1.0 if options.quick else options.seconds
    rows: list[dict] = []
    started = time.perf_counter()
    for dtype_name in DTYPES:
        for length in lengths:
            # Compiling flex takes most of a quick run.
            flex = ["flex"] if not options.quick or (length, dtype_name) == (lengths[0], "float32") else []
            rows += measure(length, dtype_name, ["causal", "dense", *flex, "merged"], budget)
            spent = time.perf_counter() - started
            print(f"{dtype_name}, {length} tokens: measured, {spent:.0f} s so far", file=sys.stderr, flush=True)
            if options.json:
                options.json.write_text(json.dumps(rows, indent=1) + "\n")
        print_table(rows, dtype_name)


if __name__ == "__main__":
    main()
