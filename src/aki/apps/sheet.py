"""Samples as training sees them, drawn: the picture after pre-processing, the text by the part it plays, the mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aki.attention import dense_mask, get_rule
from aki.layout import IGNORE_INDEX, IMAGE, build_layout
from aki.models.processing import AkiProcessor

COLOURS = {"prompt": "#1a1a1a", "media": "#b45309", "label": "#2b6cb0", "neither": "#9ca3af"}
"""What a token is: read, a picture's placeholder, learned, or none of these."""
COLUMNS, LINES = 64, 14
"""Characters a line, and lines, that a sample's text has room for."""
FONT = 7.0
_CHARACTER = 0.6021 * FONT / 72
"""Inches that a character of DejaVu Sans Mono is wide."""


@dataclass(frozen=True)
class Shown:
    """A sample to draw.

    Attributes:
        title: its source and id.
        row: model inputs with labels, (1, tokens) each, and pixel_values (images, 3, height, width) if it has any.
    """

    title: str
    row: dict[str, Tensor]


def draw_sheet(samples: Sequence[Shown], processor: AkiProcessor, rule: str, path: Path, across: int = 3) -> None:
    """Draw samples side by side.

    Args:
        rule: the attention rule that the masks are of.
        across: samples beside each other.

    Raises:
        ValueError: the path names no picture file.
    """
    if path.is_dir() or not path.suffix:
        raise ValueError(f"{path} names no picture file: give it a name and a format, for instance sheet.png.")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    across = min(across, len(samples))
    down = -(-len(samples) // across)
    width, height = COLUMNS * _CHARACTER + 0.3, 4.1
    figure = plt.figure(figsize=(across * width, down * height + 0.5), dpi=130)
    share = height / (down * height + 0.5)
    for place, shown in enumerate(samples):
        line, column = divmod(place, across)
        box = (column / across, 1 - (line + 1) * share, 1 / across, share)
        _draw_sample(figure, box, shown, processor, rule)
    legend = [
        Patch(color=COLOURS["prompt"], label="prompt"),
        Patch(color=COLOURS["media"], label="media"),
        Patch(color=COLOURS["label"], label="label"),
        Patch(color="#c7d3e3", label="mask: causal"),
        Patch(color="#2b6cb0", label=f"mask: opened by {rule}"),
        Patch(color="#e8b4b4", label=f"mask: closed by {rule}"),
    ]
    figure.legend(handles=legend, loc="lower center", ncols=len(legend), frameon=False, fontsize=FONT + 1)
    figure.savefig(path)
    plt.close(figure)


def _draw_sample(figure: Any, box: tuple[float, ...], shown: Shown, processor: AkiProcessor, rule: str) -> None:
    left, bottom, width, height = box
    tokens = shown.row["input_ids"].shape[1]
    figure.text(left + 0.03 * width, bottom + 0.955 * height, f"{shown.title}, {tokens} tokens", fontsize=FONT + 1)
    side = 0.44
    picture = figure.add_axes((left + 0.03 * width, bottom + 0.46 * height, side * width, 0.46 * height))
    pictures = shown.row.get("pixel_values")
    if pictures is None:
        picture.text(0.5, 0.5, "no picture", ha="center", va="center", fontsize=FONT + 1, color=COLOURS["neither"])
    else:
        picture.imshow(as_seen(pictures, processor))
    mask = figure.add_axes((left + 0.53 * width, bottom + 0.46 * height, side * width, 0.46 * height))
    _draw_mask(mask, shown.row, processor, rule)
    for axis in (picture, mask):
        axis.set_xticks([])
        axis.set_yticks([])
    text = figure.add_axes((left + 0.03 * width, bottom + 0.02 * height, 0.94 * width, 0.42 * height))
    text.set(xlim=(0, COLUMNS), ylim=(LINES, 0))
    text.axis("off")
    for line, column, piece, part in lay_out(parts(shown.row, processor)):
        text.text(column, line, piece, color=COLOURS[part], family="DejaVu Sans Mono", fontsize=FONT, va="top")


def as_seen(pixel_values: Tensor, processor: AkiProcessor) -> np.ndarray:
    """Pictures after pre-processing, side by side: (height, width of all, 3) uint8, the normalisation undone."""
    images = processor.image_processor
    mean, std = (torch.tensor(values)[:, None, None] for values in (images.image_mean, images.image_std))
    whole = torch.cat(list(pixel_values * std + mean), dim=2)
    return (whole.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


def _draw_mask(axis: Any, row: dict[str, Tensor], processor: AkiProcessor, rule: str) -> None:
    from matplotlib.colors import ListedColormap

    layout = build_layout(
        row["input_ids"],
        {IMAGE: processor.image_token_id},
        processor.image_seq_length,
        prompt_block_ids=row["prompt_block_ids"],
    )
    seen, causal = (dense_mask(get_rule(name), layout)[0] for name in (rule, "causal"))
    shades = torch.where(seen, torch.where(causal, 1, 2), torch.where(causal, 3, 0))
    colours = ListedColormap(["white", "#c7d3e3", "#2b6cb0", "#e8b4b4"])
    axis.imshow(shades, cmap=colours, vmin=0, vmax=3, interpolation="nearest")


def parts(row: dict[str, Tensor], processor: AkiProcessor) -> list[tuple[str, str]]:
    """The text in runs of one kind, as (text, kind); an image's placeholders as one word with their number.

    Kinds are the keys of COLOURS.
    """
    ids, labels, blocks = (row[name][0].tolist() for name in ("input_ids", "labels", "prompt_block_ids"))

    def kind(place: int) -> str:
        if ids[place] == processor.image_token_id:
            return "media"
        if labels[place] != IGNORE_INDEX:
            return "label"
        return "prompt" if blocks[place] >= 0 else "neither"

    runs = []
    for part, places in groupby(range(len(ids)), key=kind):
        run = [ids[place] for place in places]
        text = f"{processor.image_token} x {len(run)}" if part == "media" else processor.tokenizer.decode(run)
        runs.append((text, part))
    return runs


def lay_out(runs: Sequence[tuple[str, str]]) -> list[tuple[int, int, str, str]]:
    """Runs on lines of COLUMNS characters, as (line, column, text, kind); what does not fit ends with an ellipsis."""
    placed: list[tuple[int, int, str, str]] = []
    line = column = 0
    for text, part in runs:
        for number, rest in enumerate(text.split("\n")):
            if number:
                line, column = line + 1, 0
            while rest:
                piece, rest = rest[: COLUMNS - column], rest[COLUMNS - column :]
                if line >= LINES:
                    last = placed.pop()
                    return [*placed, (last[0], last[1], last[2][: COLUMNS - last[1] - 1] + "…", last[3])]
                placed.append((line, column, piece, part))
                line, column = (line + 1, 0) if rest else (line, column + len(piece))
    return placed
