"""Pictures of masks."""

from __future__ import annotations

from pathlib import Path

import torch

from aki.attention import dense_mask, get_rule
from aki.layout import IMAGE, SequenceLayout, build_layout


def example_layout(image_tokens: int = 4) -> tuple[SequenceLayout, list[str]]:
    """A prompt with one picture and its answer, and a name for every token."""
    names = ["user", *["image"] * image_tokens, "how", "many", "are", "red", "?", "assistant", "two", "end"]
    ids = torch.tensor([[IMAGE if name == "image" else 0 for name in names]])
    answer = names.index("assistant") + 1
    blocks = torch.tensor([[0] * answer + [-1] * (len(names) - answer)])
    return build_layout(ids, {IMAGE: IMAGE}, image_tokens, prompt_block_ids=blocks), names


def draw_masks(rules: list[str], path: Path) -> dict[str, tuple[int, int]]:
    """Draw the masks of rules side by side; returns rule -> (pairs allowed, pairs beyond causal)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    layout, names = example_layout()
    causal = dense_mask(get_rule("causal"), layout)[0]
    figure, axes = plt.subplots(1, len(rules), figsize=(5.2 * len(rules), 5.8), layout="constrained", squeeze=False)
    colours = ListedColormap(["white", "#c7d3e3", "#2b6cb0", "#e8b4b4"])
    counts = {}
    for axis, name in zip(axes[0], rules, strict=True):
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
    legend = [
        Patch(color="#c7d3e3", label="as in causal attention"),
        Patch(color="#2b6cb0", label="opened by the rule"),
    ]
    figure.legend(handles=legend, loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return counts
