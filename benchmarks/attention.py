"""Time and peak memory of ways to compute mma, as ratios to causal attention in the same run.

Two kinds of rows: one turn (9/16 pictures, a prompt of 1/8, then the answer, which is where the paper's long inputs
stand), and a packed row of 8,192 tokens made of samples of the paper's lengths. Beside segments and the dense mask is
`merged`, which is how mma was computed before segments, and on a GPU torch's own `flex`. They take turns, and each
keeps its best time, so that a noisy machine disturbs all alike. The row `auto` repeats that of what auto takes. Peak
memory is what the allocator held beyond inputs at its highest.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import torch
from merged import Merged, calls
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

from aki.attention import dense_mask, get_rule
from aki.attention.choice import choose
from aki.attention.kernels import segment_attention
from aki.attention.segments import allowed_pairs, encode, segments
from aki.layout import IMAGE, SequenceLayout

LENGTHS = {"cpu": (512, 1024, 2048, 4096, 8192, 16384), "cuda": (512, 1024, 2048, 4096, 8192, 16384, 32768)}
QUICK_LENGTHS = (512, 1024, 2048)
HEADS = {"cpu": ((8, 64),), "cuda": ((32, 96), (32, 128))}
DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16",)}
PASSES = ("forward", "backward", "both")
MMA, CAUSAL = get_rule("mma"), get_rule("causal")
PACKED_ROW, IMAGE_TOKENS = 8192, 144
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def one_turn(length: int) -> SequenceLayout:
    """Pictures, a prompt, an answer."""
    return _layout([(length * 9 // 16, length // 8, length - length * 9 // 16 - length // 8)])


def packed_row(length: int = PACKED_ROW) -> SequenceLayout:
    """Whole samples of the paper's lengths: a picture of 144 tokens, a prompt of 20 to 80, an answer of 2 to 200."""
    generator = torch.Generator().manual_seed(0)
    samples, room = [], length
    while room > 0:
        prompt, answer = (int(torch.randint(low, high, (), generator=generator)) for low, high in ((20, 81), (2, 201)))
        if IMAGE_TOKENS + prompt + answer > room:
            prompt, answer = room, 0
            samples.append((0, prompt, answer))
            break
        samples.append((IMAGE_TOKENS, prompt, answer))
        room -= IMAGE_TOKENS + prompt + answer
    return _layout(samples)


def _layout(samples: list[tuple[int, int, int]]) -> SequenceLayout:
    """Of one row.

    Args:
        samples: tokens of the picture, the prompt, the answer.
    """
    columns: tuple[list[int], ...] = ([], [], [], [])
    for number, (pictures, prompt, answer) in enumerate(samples):
        columns[0].extend([number] * (pictures + prompt + answer))
        columns[1].extend([IMAGE] * pictures + [0] * (prompt + answer))
        columns[2].extend([number] * pictures + [-1] * (prompt + answer))
        columns[3].extend([number] * (pictures + prompt) + [-1] * answer)
    return SequenceLayout(*(torch.tensor(column)[None] for column in columns))


def names_of(what: str, device: str) -> list[str]:
    """What is measured of a kind of rows; the first is what the others are ratios to."""
    bases = ["causal by documents", "causal"] if what == "packed" else ["causal"]
    # On a GPU many documents were no merge before segments either.
    rivals = {"cpu": ["merged"], "cuda": ["flex"] if what == "packed" else ["flex", "merged"]}
    return [*bases, "dense", *rivals[device], "segments"]


def backend(layout: SequenceLayout, name: str, device: str, heads: tuple[int, int], dtype: torch.dtype) -> Attention:
    """`causal` is the library's own over the whole row, `causal by documents` is ours of the rule causal."""

    def by_segments(rule) -> Attention:
        plan = encode(segments(rule, layout))
        return lambda query, key, value: segment_attention(query, key, value, plan, heads[1] ** -0.5)

    def dense() -> Attention:
        mask = dense_mask(MMA, layout)[:, None].to(device)
        return lambda query, key, value: scaled_dot_product_attention(query, key, value, attn_mask=mask)

    def merged() -> Attention:
        made = calls(layout, device, dtype)
        return lambda query, key, value: Merged.apply(query, key, value, made)

    def flex() -> Attention:
        there = layout.to(torch.device(device))
        length = layout.shape[1]
        mask = create_block_mask(lambda b, h, q, k: MMA.sees(there, b, q, k), 1, None, length, length, device)
        return partial(_flex(), block_mask=mask)

    made: dict[str, Callable[[], Attention]] = {
        "causal": lambda: lambda query, key, value: scaled_dot_product_attention(query, key, value, is_causal=True),
        "causal by documents": lambda: by_segments(CAUSAL),
        "segments": lambda: by_segments(MMA),
        "dense": dense,
        "merged": merged,
        "flex": flex,
    }
    return made[name]()


@cache
def _flex() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=False)


def inputs(length: int, dtype: torch.dtype, device: str, heads: tuple[int, int]) -> list[Tensor]:
    torch.manual_seed(0)
    shape = (1, length, *heads)
    return [torch.randn(shape, dtype=dtype, device=device).transpose(1, 2).requires_grad_() for _ in range(3)]


def seconds(attention: Attention, tensors: list[Tensor]) -> dict[str, float]:
    def now() -> float:
        if tensors[0].is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    start = now()
    out = attention(*tensors)
    middle = now()
    torch.autograd.grad(out, tensors, torch.ones_like(out))
    end = now()
    return {"forward": middle - start, "backward": end - middle, "both": end - start}


def best_seconds(functions: dict[str, Attention], tensors: list[Tensor], budget: float) -> dict[str, dict[str, float]]:
    """The best of as many rounds as fit in `budget` seconds, two at least: the first one warms up."""
    best: dict[str, dict[str, float]] = {name: {} for name in functions}
    started, rounds = time.perf_counter(), 0
    while rounds < 2 or time.perf_counter() - started < budget:
        for name, attention in functions.items():
            taken = seconds(attention, tensors)
            best[name] = {step: min(value, best[name].get(step, value)) for step, value in taken.items()}
        rounds += 1
    return best


def peak_megabytes(make: Callable[[], Attention], tensors: list[Tensor]) -> float:
    """Masks and plans are made anew, so that they count."""
    if tensors[0].is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        seconds(make(), tensors)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        seconds(make(), tensors)
    assert recorded.profiler is not None
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / 2**20


def measure(what: str, layout: SequenceLayout, dtype_name: str, device: str, heads: tuple[int, int], budget: float):
    """Rows of the backends, and of what `auto` would take of them."""
    dtype, length = getattr(torch, dtype_name), layout.shape[1]
    names = names_of(what, device)
    base, tensors = names[0], inputs(length, dtype, device, heads)
    make = {name: partial(backend, layout, name, device, heads, dtype) for name in names}
    best = best_seconds({name: made() for name, made in make.items()}, tensors, budget)
    # The profiler starts threads of its own: memory comes after time.
    peaks = {name: peak_megabytes(made, tensors) for name, made in make.items()}
    found = tuple(segments(MMA, layout))
    by_documents = allowed_pairs(segments(CAUSAL, layout))
    pairs = {"causal": length * (length + 1) // 2, "causal by documents": by_documents}
    of_mma = allowed_pairs(found)
    taken_by_auto = choose("auto", found, layout, torch.empty(1, length, 0, dtype=dtype, device=device), heads[0])
    sources = {name: name for name in names} | {"auto": taken_by_auto.backend}
    return [
        {
            "what": what,
            "length": length,
            "dtype": dtype_name,
            "heads": f"{heads[0]} x {heads[1]}",
            "backend": name,
            "pass": step,
            "seconds": taken,
            "ratio_to_causal": taken / best[base][step],
            "ratio_to_merged": taken / best["merged"][step] if "merged" in best else None,
            "pair_ratio": pairs.get(name, of_mma) / pairs[base],
            # Of the pairs that its rule allows; 2 products forward, 5 backward.
            "tflops": _PRODUCTS[step] * 2 * pairs.get(name, of_mma) * heads[0] * heads[1] / taken / 1e12,
            "peak_mb": peaks[source],
        }
        for name, source in sources.items()
        for step, taken in best[source].items()
    ]


_PRODUCTS = {"forward": 2, "backward": 5, "both": 7}


def print_table(rows: list[dict], device: str) -> None:
    where = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"\n{where}: time as a ratio to causal attention (of packed rows: causal by documents)\n")
    titles = ["what", "length", "dtype", "heads", "backend", "forward", "backward", "both", "both / merged"]
    titles += ["allowed pairs", "TFLOP/s", "peak MB"]
    print(f"| {' | '.join(titles)} |\n| --- | ---: | --- | --- | --- |{' ---: |' * 7}")
    keys = ("what", "length", "dtype", "heads", "backend")
    for key in dict.fromkeys(tuple(row[name] for name in keys) for row in rows):
        own = {row["pass"]: row for row in rows if tuple(row[name] for name in keys) == key}
        ratios = " | ".join(f"{own[step]['ratio_to_causal']:.2f}" for step in PASSES)
        one = own["both"]
        before = "" if one["ratio_to_merged"] is None else f"{one['ratio_to_merged']:.3f}"
        rest = f"{before} | {one['pair_ratio']:.2f} | {one['tflops']:.3f} | {one['peak_mb']:.1f}"
        print(f"| {' | '.join(map(str, key))} | {ratios} | {rest} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three lengths, within a minute")
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--lengths", type=int, nargs="+", help="of one turn")
    parser.add_argument("--seconds", type=float, default=12.0, help="time to spend on each length and dtype")
    options = parser.parse_args()
    lengths = options.lengths or (QUICK_LENGTHS if options.quick else LENGTHS[options.device])
    budget = 1.0 if options.quick else options.seconds
    layouts = [("one turn", one_turn(length)) for length in lengths] + [("packed", packed_row())]
    rows: list[dict] = []
    started = time.perf_counter()
    for dtype_name in DTYPES[options.device]:
        for heads in HEADS[options.device]:
            for what, layout in layouts:
                rows += measure(what, layout, dtype_name, options.device, heads, budget)
                spent = time.perf_counter() - started
                size = f"{what}, {layout.shape[1]} tokens, {dtype_name}"
                print(f"{size}: measured, {spent:.0f} s so far", file=sys.stderr, flush=True)
                if options.json:
                    options.json.write_text(json.dumps(rows, indent=1) + "\n")
    print_table(rows, options.device)


if __name__ == "__main__":
    main()
