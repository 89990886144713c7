"""Samples as training sees them, drawn: the picture after pre-processing, the text by the part it plays, the mask."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from aki.attention import dense_mask, get_rule
from aki.layout import IGNORE_INDEX, IMAGE, build_layout
from aki.models.processing import AkiProcessor

COLOURS = {"prompt": "#1a1a1a", "media": "#b45309", "label": "#15803d", "neither": "#9ca3af"}
"""What a token is: read, a picture's placeholder, learned, or none of these."""
COLUMNS, LINES = 64, 24
"""Characters a line, and lines, that a sample's text may take."""
FONT = 7.0
_CHARACTER = 0.6021 * FONT / 72
"""Inches that a character of DejaVu Sans Mono is wide."""
_LINE, _TOP, _GAP = 0.135, 2.2, 0.3
"""Inches: a line of text, what stands above the text, and between samples."""


_WORD = re.compile(r"\n|[^\S\n]+|<\|?\w+\|?>|<|[^\s<]+")


class Piece(NamedTuple):
    """Some text of one kind, a key of COLOURS, and where it stands."""

    line: int
    column: int
    text: str
    part: str


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
        ValueError: the path names no picture file, or there are no samples.
    """
    if path.is_dir() or not path.suffix:
        raise ValueError(f"{path} names no picture file: give it a name and a format, for instance sheet.png.")
    if not samples:
        raise ValueError("there is nothing to draw: ask for at least one sample.")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    across = min(across, len(samples))
    down = -(-len(samples) // across)
    texts = [lay_out(parts(shown.row, processor)) for shown in samples]
    lines = 1 + max(piece.line for text in texts for piece in text)
    width, height = COLUMNS * _CHARACTER, _TOP + lines * _LINE
    figure = plt.figure(figsize=(across * (width + _GAP), down * (height + _GAP) + _GAP), dpi=130)
    for place, (shown, text) in enumerate(zip(samples, texts, strict=True)):
        line, column = divmod(place, across)
        corner = (_GAP / 2 + column * (width + _GAP), _GAP + (down - 1 - line) * (height + _GAP))
        _draw_sample(_Cell(figure, *corner, height), shown, text, processor, rule)
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


@dataclass(frozen=True)
class _Cell:
    """A place on the sheet, in inches from its lower left corner."""

    figure: Any
    left: float
    bottom: float
    height: float

    def axes(self, left: float, top: float, width: float, height: float) -> Any:
        """Axes without ticks, `top` counted from the cell's upper edge."""
        whole_width, whole_height = self.figure.get_size_inches()
        bottom = self.bottom + self.height - top - height
        box = ((self.left + left) / whole_width, bottom / whole_height, width / whole_width, height / whole_height)
        axes = self.figure.add_axes(box)
        axes.set_xticks([])
        axes.set_yticks([])
        return axes


def _draw_sample(cell: _Cell, shown: Shown, text: Sequence[Piece], processor: AkiProcessor, rule: str) -> None:
    side, strip = _TOP - 0.5, 0.07
    width = COLUMNS * _CHARACTER
    picture = cell.axes(0, 0.25, side, side)
    picture.set_title(f"{shown.title}, {shown.row['input_ids'].shape[1]} tokens", fontsize=FONT + 1, loc="left")
    pictures = shown.row.get("pixel_values")
    if pictures is None:
        picture.text(0.5, 0.5, "no picture", ha="center", va="center", fontsize=FONT + 1, color=COLOURS["neither"])
    else:
        picture.imshow(as_seen(pictures, processor))
    _draw_mask(cell.axes(width - side, 0.25, side, side), shown.row, processor, rule)
    kinds = np.array([list(COLOURS).index(kind) for kind in token_kinds(shown.row, processor)])
    for where, shape in (
        ((width - side - 1.5 * strip, 0.25, strip, side), (-1, 1)),
        ((width - side, 0.25 + side + 0.5 * strip, side, strip), (1, -1)),
    ):
        _draw_kinds(cell.axes(*where), kinds.reshape(shape))
    lines = 1 + max(piece.line for piece in text)
    written = cell.axes(0, _TOP, width, lines * _LINE)
    written.set(xlim=(0, COLUMNS), ylim=(lines, 0))
    written.axis("off")
    for piece in text:
        colour = COLOURS[piece.part]
        place = (piece.column, piece.line + 0.8)
        written.text(*place, piece.text, color=colour, family="DejaVu Sans Mono", fontsize=FONT, va="baseline")


def _draw_kinds(axes: Any, kinds: np.ndarray) -> None:
    """A strip of one cell a token."""
    from matplotlib.colors import ListedColormap

    colours = ListedColormap(list(COLOURS.values()))
    axes.imshow(kinds, cmap=colours, vmin=0, vmax=len(COLOURS) - 1, interpolation="nearest", aspect="auto")
    axes.axis("off")


def as_seen(pixel_values: Tensor, processor: AkiProcessor) -> np.ndarray:
    """Pictures after pre-processing, side by side: (height, width of all, 3) uint8, the normalisation undone."""
    images = processor.image_processor
    mean, std = (torch.tensor(values)[:, None, None] for values in (images.image_mean, images.image_std))
    whole = torch.cat(list(pixel_values * std + mean), dim=2)
    return (whole.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


def _draw_mask(axis: Any, row: dict[str, Tensor], processor: AkiProcessor, rule: str) -> None:
    from matplotlib.colors import ListedColormap

    side = math.isqrt(processor.image_seq_length)
    layout = build_layout(
        row["input_ids"],
        {IMAGE: processor.image_token_id},
        processor.image_seq_length,
        prompt_block_ids=row["prompt_block_ids"],
        # Only rules that number tokens by their place in the picture ask for it.
        grids={IMAGE: (side, side)} if side**2 == processor.image_seq_length else None,
    )
    seen, causal = (dense_mask(get_rule(name), layout)[0] for name in (rule, "causal"))
    shades = torch.where(seen, torch.where(causal, 1, 2), torch.where(causal, 3, 0))
    colours = ListedColormap(["white", "#c7d3e3", "#2b6cb0", "#e8b4b4"])
    axis.imshow(shades, cmap=colours, vmin=0, vmax=3, interpolation="nearest")


def token_kinds(row: dict[str, Tensor], processor: AkiProcessor) -> list[str]:
    """What each token is, a key of COLOURS."""
    ids, labels, blocks = (row[name][0].tolist() for name in ("input_ids", "labels", "prompt_block_ids"))
    return [
        "media"
        if token == processor.image_token_id
        else "label"
        if label != IGNORE_INDEX
        else "prompt"
        if block >= 0
        else "neither"
        for token, label, block in zip(ids, labels, blocks, strict=True)
    ]


def parts(row: dict[str, Tensor], processor: AkiProcessor) -> list[tuple[str, str]]:
    """The text in runs of one kind, as (text, kind); an image's placeholders as one word with their number."""
    ids = row["input_ids"][0].tolist()
    runs = []
    for part, tokens in groupby(zip(ids, token_kinds(row, processor), strict=True), key=itemgetter(1)):
        run = [token for token, _ in tokens]
        text = f"{processor.image_token} x {len(run)} " if part == "media" else processor.tokenizer.decode(run)
        runs.append((text, part))
    return runs


def lay_out(runs: Sequence[tuple[str, str]], columns: int = COLUMNS, lines: int = LINES) -> list[Piece]:
    """Runs on lines, broken between words; of a longer text the middle is left out."""
    placed: list[Piece] = []
    line = column = 0
    for text, part in runs:
        for word in _WORD.findall(text):
            if word == "\n" or (column + len(word) > columns and column > 0):
                line, column = line + 1, 0
            if word.isspace():
                column += len(word) if column else 0
            else:
                placed.append(Piece(line, column, word[:columns], part))
                column += len(word)
    missing = line + 1 - lines
    if missing <= 0:
        return placed
    head = lines // 2
    end = [piece._replace(line=piece.line - missing) for piece in placed if piece.line > head + missing]
    return [*(piece for piece in placed if piece.line < head), Piece(head, 0, "…", "neither"), *end]
