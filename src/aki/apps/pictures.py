"""Pictures of masks."""

from __future__ import annotations

from math import isqrt
from pathlib import Path

import torch

from aki.attention import dense_mask, get_rule
from aki.attention.rectangles import mma_rectangles, plan_parts
from aki.layout import IMAGE, SequenceLayout, build_layout


def example_layout(image_tokens: int = 4) -> tuple[SequenceLayout, list[str]]:
    """A prompt with one square picture and its answer, and a name for every token."""
    names = ["user", *["image"] * image_tokens, "how", "many", "are", "red", "?", "assistant", "two", "end"]
    ids = torch.tensor([[IMAGE if name == "image" else 0 for name in names]])
    answer = names.index("assistant") + 1
    blocks = torch.tensor([[0] * answer + [-1] * (len(names) - answer)])
    side = isqrt(image_tokens)
    grids = {IMAGE: (side, side)}
    return build_layout(ids, {IMAGE: IMAGE}, image_tokens, prompt_block_ids=blocks, grids=grids), names


def draw_masks(rules: list[str], path: Path) -> dict[str, tuple[int, int]]:
    """Draw the masks of rules, three a line; returns rule -> (pairs allowed, pairs beyond causal).

    Where a rule has rings, the picture is of 3 x 3 tokens, which have two, else of 2 x 2.

    Raises:
        ValueError: no such rule, or the path names no picture file.
    """
    if path.is_dir() or not path.suffix:
        raise ValueError(f"{path} names no picture file: give it a name and a format, for instance mask.png.")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    layout, names = example_layout(9 if any(get_rule(rule).positions for rule in rules) else 4)
    causal = dense_mask(get_rule("causal"), layout)[0]
    columns = min(len(rules), 3)
    lines = -(-len(rules) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(5.2 * columns, 5.2 * lines + 0.6), layout="constrained", squeeze=False
    )
    colours = ListedColormap(["white", "#c7d3e3", "#2b6cb0", "#e8b4b4"])
    counts, closes = {}, False
    for axis in axes.flat[len(rules) :]:
        axis.remove()
    for axis, name in zip(axes.flat, rules, strict=False):
        mask = dense_mask(get_rule(name), layout)[0]
        shades = torch.where(mask, torch.where(causal, 1, 2), torch.where(causal, 3, 0))
        axis.imshow(shades, cmap=colours, vmin=0, vmax=3)
        axis.set_title(name, fontsize=13)
        axis.set_xticks(range(len(names)), names, rotation=90)
        axis.set_yticks(range(len(names)), names)
        axis.set_xticks([x - 0.5 for x in range(1, len(names))], minor=True)
        axis.set_yticks([x - 0.5 for x in range(1, len(names))], minor=True)
        axis.grid(which="minor", color="white", linewidth=1.5)
        axis.tick_params(which="both", length=0)
        axis.set_xlabel("is seen")
        axis.set_ylabel("sees")
        counts[name] = (int(mask.sum()), int((mask & ~causal).sum()))
        closes |= bool((causal & ~mask).any())
    legend = [
        Patch(color="#c7d3e3", label="as in causal attention"),
        Patch(color="#2b6cb0", label="opened by the rule"),
    ]
    legend += [Patch(color="#e8b4b4", label="closed by the rule")] if closes else []
    figure.legend(handles=legend, loc="outside lower center", ncols=len(legend), frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return counts


def draw_plan(path: str | Path) -> int:
    """Draw the calls that compute `mma` without a mask, for two packed documents; returns how many there are."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Polygon, Rectangle

    first = ["text", *["image"] * 6, *["prompt"] * 3, *["answer"] * 2]
    names = [*first, *["image"] * 4, "prompt", *["image"] * 4, *["prompt"] * 2, *["answer"] * 2]
    length = len(names)
    ids = torch.tensor([[IMAGE if name == "image" else 0 for name in names]])
    positions = torch.tensor([[*range(len(first)), *range(length - len(first))]])
    blocks = torch.tensor([[-1 if name == "answer" else 0 for name in names]])
    layout = build_layout(ids, {IMAGE: IMAGE}, 4, position_ids=positions, prompt_block_ids=blocks)
    parts = plan_parts(layout, mma_rectangles(layout))
    figure, axis = plt.subplots(figsize=(6.4, 6.6), layout="constrained")
    for number, part in enumerate(parts, 1):
        (top, bottom), (left, right) = part[2:4], part[4:6]
        if part.is_causal:
            steps = [(left, top)] + [corner for i in range(right - left) for corner in _stair(left + i, top + i)]
            axis.add_patch(Polygon([*steps, (left, bottom)], facecolor="#c7d3e3", edgecolor="white"))
        else:
            axis.add_patch(Rectangle((left, top), right - left, bottom - top, facecolor="#2b6cb0", edgecolor="white"))
        where = (left + (right - left) / 3, top + (bottom - top) * 2 / 3) if part.is_causal else None
        x, y = where or ((left + right) / 2, (top + bottom) / 2)
        axis.text(x, y, str(number), ha="center", va="center", fontsize=12, color="black" if where else "white")
    axis.set(xlim=(0, length), ylim=(length, 0), xlabel="is seen", ylabel="sees", aspect="equal")
    ticks = [position + 0.5 for position in range(length)]
    axis.set_xticks(ticks, names, rotation=90)
    axis.set_yticks(ticks, names)
    axis.tick_params(length=0)
    axis.set_title("mma on two packed documents: causal squares, and rectangles")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return len(parts)


def _stair(x: int, y: int) -> list[tuple[int, int]]:
    """A step of the diagonal: token x sees itself."""
    return [(x + 1, y), (x + 1, y + 1)]
