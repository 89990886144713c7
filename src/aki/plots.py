"""Pictures of what an image read: attention laid over the picture, as PIL images, which notebooks show as they are."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import Literal

import numpy as np
from PIL import Image

from aki.models.explain import Explanation

_HEAT = np.array([255, 106, 0], dtype=np.float32)
_DIMMED = 0.45
"""What is left of the picture's brightness where nobody looks."""

Part = Literal["question", "answer"]


def word_map(explanation: Explanation, word: int, part: Part = "question", layer: int | None = None) -> np.ndarray:
    """(rows, columns) of one word: its map in a layer (0 is the first), or the mean over all of them.

    Args:
        word: an index into `explanation.question_words` or `answer_words`.

    Raises:
        ValueError: there is no such word or layer.
    """
    maps = explanation.question_maps if part == "question" else explanation.answer_maps
    layers, words = maps.shape[:2]
    if not 0 <= word < words:
        raise ValueError(f"there is no word {word} in the {part}, which has {words}.")
    if layer is not None and not 0 <= layer < layers:
        raise ValueError(f"there is no layer {layer}; the model has layers 0 to {layers - 1}.")
    return maps[:, word].mean(0) if layer is None else maps[layer, word]


def overlay(image: Image.Image, heat: np.ndarray, top: float | None = None, side: int = 480) -> Image.Image:
    """A picture under a map of its patches: dark where nobody looks, orange where most do.

    Args:
        heat: (rows, columns), not negative.
        top: the value that is full orange; the map's largest if absent. Give two maps the same to compare them.
        side: pixels of the longer side of what is returned.
    """
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    # Interpolation would blur the few pixels of a small picture.
    resampling = Image.Resampling.NEAREST if scale > 4 else Image.Resampling.LANCZOS
    picture = np.asarray(image.convert("RGB").resize(size, resampling), dtype=np.float32)
    top = float(heat.max()) if top is None else top
    share = np.clip(heat / top, 0, 1) if top > 0 else np.zeros_like(heat)
    # A patch is one value: blending into its neighbours would show detail that is not there.
    spread = Image.fromarray(share.astype(np.float32)).resize(size, Image.Resampling.NEAREST)
    strength = np.asarray(spread)[..., None]
    lit = picture * (_DIMMED + (1 - _DIMMED) * strength)
    return Image.fromarray((lit * (1 - 0.55 * strength) + _HEAT * 0.55 * strength).round().astype(np.uint8))


def words(explanations: Sequence[Explanation], part: Part = "question", layer: int | None = None) -> Image.Image:
    """A row of overlays for each explanation (one a rule, say), a column a word; a column has one scale.

    Raises:
        ValueError: no explanations, or no words.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    texts = [e.question_words if part == "question" else e.answer_words for e in explanations]
    columns = max((len(row) for row in texts), default=0)
    if columns == 0:
        raise ValueError(f"there are no words of the {part} to draw.")
    figure = Figure(figsize=(1.5 * columns + 0.6, 2.1 * len(texts)), layout="constrained")
    axes = figure.subplots(len(texts), columns, squeeze=False)
    for axis in axes.ravel():
        axis.set_axis_off()
    for column in range(columns):
        shown = [
            (row, word_map(e, column, part, layer)) for row, e in enumerate(explanations) if column < len(texts[row])
        ]
        top = max(float(heat.max()) for _, heat in shown)
        for row, heat in shown:
            axis = axes[row, column]
            axis.imshow(overlay(explanations[row].image, heat, top, side=240))
            axis.set_title(f"{texts[row][column]}\n{heat.sum() if part == 'answer' else heat.max():.2f}", fontsize=9)
    for row, explanation in enumerate(explanations):
        axes[row, 0].text(
            -0.12, 0.5, explanation.rule, rotation=90, va="center", ha="center", transform=axes[row, 0].transAxes
        )
    file = BytesIO()
    FigureCanvasAgg(figure).print_png(file)
    return Image.open(file)
