"""Pictures of masks."""

from __future__ import annotations

from math import isqrt
from pathlib import Path

import torch

from aki.attention import dense_mask, get_rule
from aki.attention.segments import length, segments
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


def draw_segments(path: str | Path) -> int:
    """Draw the attention calls that compute `mma` on one turn, keys in the order in which each is given them.

    Returns:
        How many there are.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import ListedColormap

    names = ["system", "system", *["picture"] * 5, *["prompt"] * 3, *["answer"] * 3]
    ids = torch.tensor([[IMAGE if name == "picture" else 0 for name in names]])
    blocks = torch.tensor([[-1 if name == "answer" else 0 for name in names]])
    found = segments("mma", build_layout(ids, {IMAGE: IMAGE}, 5, prompt_block_ids=blocks))
    figure, axes = plt.subplots(
        1, len(found), figsize=(12, 4.2), layout="constrained", width_ratios=[length(s.keys) for s in found]
    )
    colours = ListedColormap(["white", "#c7d3e3", "#2b6cb0"])
    for axis, segment in zip(axes, found, strict=True):
        queries, keys = ([i for span in spans for i in range(*span)] for spans in (segment.queries, segment.keys))
        behind = len(keys) - len(queries)
        shades = [
            [0 if i > behind + row else 1 + (key > query) for i, key in enumerate(keys)]
            for row, query in enumerate(queries)
        ]
        axis.imshow(shades, cmap=colours, vmin=0, vmax=2)
        axis.set_xticks(range(len(keys)), [names[key] for key in keys], rotation=90)
        axis.set_yticks(range(len(queries)), [names[query] for query in queries])
        axis.set_xticks([x - 0.5 for x in range(1, len(keys))], minor=True)
        axis.set_yticks([y - 0.5 for y in range(1, len(queries))], minor=True)
        axis.grid(which="minor", color="white", linewidth=1.5)
        axis.tick_params(which="both", length=0)
        axis.set(xlabel="keys, in the kernel's order", ylabel="queries")
    figure.suptitle("mma on one turn: the same causal kernel, only the order of the picture's keys is another")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return len(found)
