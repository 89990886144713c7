"""DigitScenes: grids of real handwritten digits in four colours, their captions, and questions over six skills.

Everything is drawn on the fly from scikit-learn's 1,797 handwritten digits and depends only on (split, seed, index).
Training and evaluation scenes use disjoint handwriting: `handwriting(split)` says which samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from torch.utils.data import Dataset

from aki.data.schema import Sample, assistant, user

COLOURS = {"red": (255, 60, 60), "green": (60, 220, 60), "blue": (80, 110, 255), "yellow": (250, 220, 40)}
SKILLS = ("read", "colour", "count_colour", "count_digit", "exists", "relation")
SEARCHING_SKILLS = ("count_digit", "exists")
"""The skills for which the question says what to look for, not where."""
SPLITS = ("train", "test")
HELD_OUT = 0.2
PIXEL_MEAN, PIXEL_STD = 0.17, 0.26
"""Of the scenes' pixels, 0 to 1. With 0.5 and 0.5 the black ground is -1 everywhere, and digits are learned later."""
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}

QUESTIONS = {
    "read": (
        "which digit is at the {place}?",
        "what is the digit at the {place}?",
        "read the digit at the {place}.",
    ),
    "colour": (
        "what colour is the digit at the {place}?",
        "which colour does the {place} digit have?",
        "name the colour at the {place}.",
    ),
    "count_colour": (
        "how many digits are {colour}?",
        "how many {colour} digits are there?",
        "count the {colour} digits.",
    ),
    "count_digit": (
        "how many times does {digit} appear?",
        "how often is there a {digit}?",
        "count the digit {digit}.",
    ),
    "exists": (
        "is there a {colour} {digit}?",
        "does the picture show a {colour} {digit}?",
        "can you see a {colour} {digit}?",
    ),
    "relation": (
        "which digit is {relation} the {colour} {digit}?",
        "what is {relation} the {colour} {digit}?",
        "name the digit {relation} the {colour} {digit}.",
    ),
}


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    data = load_digits()
    return data.images / 16.0, data.target


@cache
def handwriting(split: str) -> tuple[np.ndarray, ...]:
    """The samples of scikit-learn's digits that a split draws, an array of indices a digit; the last fifth is "test".

    Raises:
        ValueError: there is no such split.
    """
    if split not in SPLITS:
        raise ValueError(f"there is no split {split!r}; there are {', '.join(SPLITS)}.")
    _, target = _digits()
    pools = []
    for digit in range(10):
        indices = np.flatnonzero(target == digit)
        cut = len(indices) - round(len(indices) * HELD_OUT)
        pools.append(indices[:cut] if split == "train" else indices[cut:])
    return tuple(pools)


def place_names(grid: int) -> list[str]:
    """The names of the cells, row by row."""
    rows = {2: ("top", "bottom"), 3: ("top", "middle", "bottom")}.get(grid)
    columns = {2: ("left", "right"), 3: ("left", "middle", "right")}.get(grid)
    if rows is None or columns is None:
        return [f"row {r + 1} column {c + 1}" for r in range(grid) for c in range(grid)]
    return ["centre" if row == column == "middle" else f"{row} {column}" for row in rows for column in columns]


@dataclass(frozen=True)
class Scene:
    """A grid of digits.

    Attributes:
        digits: (grid, grid) int, 0 to 9.
        colours: (grid, grid) names.
        samples: (grid, grid) int, the handwriting samples drawn.
    """

    digits: np.ndarray
    colours: np.ndarray
    samples: np.ndarray

    @property
    def grid(self) -> int:
        return self.digits.shape[0]

    def cells(self) -> Iterator[tuple[int, str, int, str]]:
        """(cell, place, digit, colour), row by row."""
        return zip(  # type: ignore[return-value]
            range(self.grid**2), place_names(self.grid), self.digits.ravel().tolist(), self.colours.ravel(), strict=True
        )

    def draw(self, image_size: int) -> Image.Image:
        """An RGB picture of image_size x image_size pixels."""
        side = image_size // self.grid
        canvas = np.zeros((image_size, image_size, 3), dtype=np.uint8)
        for cell, _, _, colour in self.cells():
            row, column = divmod(cell, self.grid)
            ink = _scaled(side)[self.samples[row, column]]
            y, x = row * side, column * side
            canvas[y : y + side, x : x + side] = (ink[..., None] * np.array(COLOURS[colour])).astype(np.uint8)
        return Image.fromarray(canvas)


@cache
def _scaled(side: int) -> np.ndarray:
    """All digits at side x side pixels, 0 to 1."""
    images, _ = _digits()
    sheets = [
        Image.fromarray(image.astype(np.float32)).resize((side, side), Image.Resampling.BILINEAR) for image in images
    ]
    return np.stack([np.asarray(sheet) for sheet in sheets])


def make_scene(rng: np.random.Generator, split: str, grid: int) -> Scene:
    digits = rng.integers(0, 10, (grid, grid))
    colours = np.array(list(COLOURS))[rng.integers(0, len(COLOURS), (grid, grid))]
    pools = handwriting(split)
    samples = np.array([pools[d][rng.integers(len(pools[d]))] for d in digits.ravel()]).reshape(grid, grid)
    return Scene(digits, colours, samples)


def caption(rng: np.random.Generator, scene: Scene) -> str:
    """Every cell with its place, and then its colour and digit in either order; the cells in random order.

    In a fixed order a model reads what comes second by what came first, wherever that stands, and never by the place.
    """
    cells = [
        f"{place} {colour} {digit}" if colour_first else f"{place} {digit} {colour}"
        for (_, place, digit, colour), colour_first in zip(scene.cells(), rng.random(scene.grid**2) < 0.5, strict=True)
    ]
    return ", ".join(cells[i] for i in rng.permutation(len(cells)))


def ask(rng: np.random.Generator, scene: Scene, skill: str) -> tuple[str, str] | None:
    """A question of that skill about the scene, and its answer; None where the scene allows no such question."""
    cells = list(scene.cells())
    _, place, digit, colour = cells[rng.integers(len(cells))]
    slots: dict[str, object] = {"place": place, "digit": digit, "colour": colour}
    if skill == "read":
        answer = str(digit)
    elif skill == "colour":
        answer = colour
    elif skill == "count_colour":
        slots["colour"] = rng.choice(list(COLOURS))
        answer = str(int((scene.colours == slots["colour"]).sum()))
    elif skill == "count_digit":
        # Half of the time any digit, which is often absent; half of the time one that is there.
        if rng.random() < 0.5:
            slots["digit"] = int(rng.integers(10))
        answer = str(int((scene.digits == slots["digit"]).sum()))
    elif skill == "exists":
        answer = "yes"
        if rng.random() < 0.5:
            absent = _absent_pairs(scene)
            slots["colour"], slots["digit"] = absent[rng.integers(len(absent))]
            answer = "no"
    else:
        found = _relations(scene)
        if not found:
            return None
        slots["relation"], slots["colour"], slots["digit"], answer = found[rng.integers(len(found))]
    wording = QUESTIONS[skill][rng.integers(len(QUESTIONS[skill]))]
    return wording.format(**slots), answer


def _absent_pairs(scene: Scene) -> list[tuple[str, int]]:
    """Pairs that are not there, of a colour and a digit that both are: what cannot be answered from either alone."""
    present = {(colour, digit) for _, _, digit, colour in scene.cells()}
    colours, digits = sorted({c for c, _ in present}), sorted({d for _, d in present})
    near = [(c, d) for c in colours for d in digits if (c, d) not in present]
    return near or [(c, d) for c in COLOURS for d in range(10) if (c, d) not in present]


def _relations(scene: Scene) -> list[tuple[str, str, int, str]]:
    """(relation, colour, digit, answer) for every neighbour of a cell that its colour and digit name alone."""
    pairs = [(colour, digit) for _, _, digit, colour in scene.cells()]
    found = []
    for cell, _, digit, colour in scene.cells():
        if pairs.count((colour, digit)) > 1:
            continue
        for relation, (down, right) in RELATIONS.items():
            row, column = cell // scene.grid + down, cell % scene.grid + right
            if 0 <= row < scene.grid and 0 <= column < scene.grid:
                found.append((relation, colour, digit, str(scene.digits[row, column])))
    return found


class DigitScenes(Dataset):
    """Captions (`task="caption"`) or questions (`task="question"`) about digit scenes, made when they are asked for.

    Args:
        split: "train" or "test", which draw different handwriting.
        task: "caption" or "question".
        size: number of samples.
        image_size: pixels a side.
        grid: cells a side.
        seed: other scenes.
        skills: the skills asked for, in turn.
    """

    def __init__(
        self,
        split: str,
        task: str,
        size: int,
        image_size: int,
        grid: int = 3,
        seed: int = 0,
        skills: tuple[str, ...] = SKILLS,
    ):
        handwriting(split)
        if task not in ("caption", "question"):
            raise ValueError(f"there is no task {task!r}; there are caption, question.")
        self.split, self.task, self.size, self.image_size = split, task, size, image_size
        self.grid, self.seed, self.skills = grid, seed, skills

    def __len__(self) -> int:
        return self.size

    def scene(self, index: int) -> tuple[Scene, np.random.Generator]:
        """The scene of a sample, and the generator that goes on to make its text."""
        key = [SPLITS.index(self.split), ("caption", "question").index(self.task), self.seed, index]
        rng = np.random.default_rng(key)
        return make_scene(rng, self.split, self.grid), rng

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.size:
            raise IndexError(f"sample {index} of {self.size}")
        scene, rng = self.scene(index)
        name = f"{self.split}-{self.seed}-{index}"
        image = scene.draw(self.image_size)
        if self.task == "caption":
            return Sample([user(image), assistant(caption(rng, scene))], "digits", name, "caption")
        skill = self.skills[index % len(self.skills)]
        asked = ask(rng, scene, skill)
        while asked is None:
            scene = make_scene(rng, self.split, self.grid)
            image, asked = scene.draw(self.image_size), ask(rng, scene, skill)
        question, answer = asked
        return Sample([user(image, question), assistant(answer)], "digits", name, skill)


@cache
def corpus(grid: int, size: int = 2000) -> tuple[str, ...]:
    """Texts that hold every word of the data, for training a tokenizer."""
    kinds = [DigitScenes("train", task, size, image_size=8 * grid, grid=grid) for task in ("caption", "question")]
    samples = (scenes[index] for scenes in kinds for index in range(size))
    return tuple(text for sample in samples for text in (sample.question, sample.answer) if text)
