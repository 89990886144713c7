"""`kind: scenes` of a recipe: captions or questions about scenes of real things, made when they are asked for."""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

from aki.data.augment import Augment
from aki.data.scenes.questions import NAMING, SKILLS, SUMS, World, ask, caption
from aki.data.scenes.scene import Scene, make_scene
from aki.data.scenes.things import HELD_OUT_ONE_IN, NoThings, Thing, drawn_by_others, read_things
from aki.data.schema import Sample, assistant, user
from aki.data.sources.files import Paths, SourceError, as_list

WORDS = files("aki.data.scenes").joinpath("words.txt").read_text().split()
"""On plates: common English words, none of them the name of a thing."""
TASKS = ("caption", "question")
PARTS = ("train", "same", "things", "words", "crowded", "drawings")
"""Training, and what is held out from it: other scenes of the same, names that it never asks for, words that it never
shows, more things than ever, and the same things drawn by others."""
CROWDED = (11, 13)
TRIES = 3
"""Skills that are tried for each further question about a picture."""


class Scenes:
    """Samples that depend on (part, task, seed, index) alone.

    Args:
        annotations: stamp folders (`aki.data.scenes.things.read_things`).
        images: the emoji font, for the part `drawings`.
        name: what counts and messages call it.
        seed: other scenes.
        task: `caption` or `question`.
        part: one of PARTS. In what is harder than `same`, a sample's skill is `PART: sums` or `PART: others`, so that
            each part is measured apart.
        size: number of samples.
        skills: the skills asked for, in turn; all if absent.
        blind: without the picture, for what can be guessed.
        turns: questions about each picture, one after the other in a chat; where a scene allows fewer, fewer.

    Raises:
        SourceError: no stamps, no font, or an option that is none of these.
    """

    def __init__(
        self,
        annotations: Paths,
        images: Paths | None = None,
        *,
        name: str = "scenes",
        seed: int = 0,
        augment: Augment | None = None,
        cache: str | Path | None = None,
        task: str = "question",
        part: str = "train",
        size: int = 1_000_000,
        skills: tuple[str, ...] = (),
        blind: bool = False,
        turns: int = 1,
    ):
        named = [("skill", skill, SKILLS) for skill in skills]
        for what, value, known in (("task", task, TASKS), ("part", part, PARTS), *named):
            if value not in known:
                raise SourceError(f"{name}: there is no {what} {value!r}; there are {', '.join(known)}.")
        if augment is not None:
            raise SourceError(f"{name}: scenes are drawn, and answers about places and sizes would change: no augment.")
        self.name, self.seed, self.task, self.part, self.size = name, seed, task, part, size
        if turns < 1:
            raise SourceError(f"{name}: turns are the questions about a picture, at least 1; they are {turns}.")
        self.turns = turns
        self.skills, self.blind = tuple(skills) or tuple(NAMING if part == "things" else SKILLS), blind
        if part == "things" and not set(self.skills) <= set(NAMING):
            raise SourceError(f"{name}: the part things asks for names, which only {', '.join(NAMING)} do.")
        try:
            self.things = _things(tuple(map(str, as_list(annotations))))
            if part == "drawings":
                self.things = drawn_by_others(self.things, Path(*as_list(images or ())))
        except NoThings as error:
            raise SourceError(f"{name}: {error}") from error
        self.words = tuple(word for word in WORDS if (crc32(word.encode()) % HELD_OUT_ONE_IN == 0) == (part == "words"))

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        return self.sample(index)

    def sample(self, index: int, epoch: int = 0) -> Sample:
        """The same in every epoch, since no epoch has to see a scene again."""
        if not 0 <= index < self.size:
            raise IndexError(f"sample {index} of {self.size} in {self.name}")
        rng = self._generator(index)
        if self.task == "caption":
            scene = self._scene(rng)
            return self._sample(index, scene, [("", caption(rng, scene))], "caption")
        skill = self.skills[index % len(self.skills)]
        asked = None
        while asked is None:
            scene = self._scene(rng)
            world = self._world(rng, scene)
            asked = ask(rng, world, skill)
            if asked and self.part == "things" and not self._unasked.intersection(_phrases(" ".join(asked))):
                asked = None
        turns = [asked]
        for other in rng.choice(self.skills, TRIES * (self.turns - 1)):
            if len(turns) == self.turns:
                break
            more = ask(rng, world, other)
            if more and more not in turns:
                turns.append(more)
        if self.part not in ("train", "same"):
            skill = f"{self.part}: {'sums' if skill in SUMS else 'others'}"
        return self._sample(index, scene, turns, skill)

    def scene(self, index: int) -> Scene:
        """The scene of a caption."""
        return self._scene(self._generator(index))

    def _generator(self, index: int) -> np.random.Generator:
        return np.random.default_rng([PARTS.index(self.part), TASKS.index(self.task), self.seed, index])

    def _scene(self, rng: np.random.Generator) -> Scene:
        return make_scene(rng, self.things, self.words, CROWDED if self.part == "crowded" else (3, 10))

    def _world(self, rng: np.random.Generator, scene: Scene) -> World:
        there = {one.name for one in scene.things}
        absent = [self.things[i] for i in rng.choice(len(self.things), min(40, len(self.things)), replace=False)]
        return World(scene, self._askable, tuple(thing for thing in absent if thing.name not in there))

    @property
    def _unasked(self) -> frozenset[str]:
        return _unasked(self.things)

    @property
    def _askable(self) -> frozenset[str]:
        names = frozenset(thing.name for thing in self.things) | frozenset(self.words)
        return names - self._unasked if self.part == "train" else names

    def _sample(self, index: int, scene: Scene, turns: list[tuple[str, str]], skill: str) -> Sample:
        image: Any = None if self.blind else scene.draw()
        chat = [message for question, answer in turns for message in (user(None, question), assistant(answer))]
        return Sample([user(image, turns[0][0]), *chat[1:]], self.name, str(index), skill)


@cache
def _things(folders: tuple[str, ...]) -> tuple[Thing, ...]:
    return read_things([Path(folder) for folder in folders])


@cache
def _unasked(things: tuple[Thing, ...]) -> frozenset[str]:
    return frozenset(thing.name for thing in things if thing.held_out)


def _phrases(text: str) -> set[str]:
    """Every stretch of one to three words."""
    words = re.findall(r"[a-z-]+", text.lower())
    return {" ".join(words[start : start + length]) for length in (1, 2, 3) for start in range(len(words))}
