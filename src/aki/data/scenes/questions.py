"""Questions about a scene, by skill: a function each, from the scene to (what fills the wording, the answer).

`SUMS` are the skills for which modality-mutual attention should help: a sum over places of something that only the
question names and that needs the neighbours. Under a causal mask a place is read before anything is asked of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from aki.data.scenes.scene import PLACES, Placed, Scene
from aki.data.scenes.things import KINDS, Thing

COUNTED = ("animals", "food", "plants", "vehicles", "clothes")
"""Kinds of which everybody knows what belongs to them."""
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
QUARTERS = {"top left": (0, 0), "top right": (0, 1), "bottom left": (1, 0), "bottom right": (1, 1)}
ORDINALS = ("first", "second", "third", "fourth")
ROWS = ("top", "upper", "lower", "bottom")
CHOICE_SHARE = 0.25
"""Of the questions, those that offer answers by letter."""
LETTERS = "ABCD"

Found = tuple[dict[str, str], str, list[str]]
"""What fills the wording, the answer, and other answers that could be taken for it."""


@dataclass(frozen=True)
class World:
    """What may be asked about: a scene, and who may be named in a question or an answer.

    Attributes:
        askable: the names of things, and the words, that questions may ask for.
        absent: things that are not in the scene, for questions whose answer is no.
    """

    scene: Scene
    askable: frozenset[str]
    absent: tuple[Thing, ...] = ()

    @property
    def named(self) -> list[Placed]:
        return [one for one in self.scene.things if one.name in self.askable]

    @property
    def plates(self) -> list[Placed]:
        return [one for one in self.scene.plates if one.word in self.askable]

    def of(self, kind: str) -> list[Placed]:
        return [one for one in self.scene.things if one.kind == kind]


def exists(rng: np.random.Generator, world: World) -> Found | None:
    """Half of the time something of a kind that is there, and itself is not."""
    if rng.random() < 0.5:
        kinds = {one.kind for one in world.scene.things}
        near = [thing for thing in world.absent if thing.kind in kinds and thing.name in world.askable]
        return None if not near else ({"name": a(_one(rng, near).name)}, "no", ["yes"])
    return None if not world.named else ({"name": a(_one(rng, world.named).name)}, "yes", ["no"])


def count(rng: np.random.Generator, world: World) -> Found:
    kind = _kind(rng, world)
    return {"kinds": _many(kind)}, *_number(len(world.of(kind)))


def relation(rng: np.random.Generator, world: World) -> Found | None:
    """What stands in the next place in a direction."""
    found = []
    for one in world.named:
        for word, (down, right) in RELATIONS.items():
            next_to = _at(world.scene, one.row + down, one.column + right)
            if next_to is not None and next_to.thing is not None and next_to.name in world.askable:
                found.append(({"relation": word, "name": one.name}, next_to.name))
    return _with_names(rng, world, found)


def larger(rng: np.random.Generator, world: World) -> Found | None:
    pairs = [(a, b) for a in world.named for b in world.named if a.size != b.size]
    if not pairs:
        return None
    one, other = _one(rng, pairs)
    big, small = (one, other) if one.size > other.size else (other, one)
    return {"one": one.name, "other": other.name}, big.name, [small.name]


def place_thing(rng: np.random.Generator, world: World) -> Found | None:
    found = [({"column": ORDINALS[one.column], "row": ROWS[one.row]}, one.name) for one in world.named]
    return _with_names(rng, world, found)


def place_word(rng: np.random.Generator, world: World) -> Found | None:
    """The word in a quarter of the picture that has one plate."""
    found = []
    for quarter, (down, right) in QUARTERS.items():
        there = [
            one for one in world.scene.plates if (2 * one.row // PLACES, 2 * one.column // PLACES) == (down, right)
        ]
        if len(there) == 1 and there[0].word in world.askable:
            found.append(({"quarter": quarter}, there[0].word))
    return _with_words(rng, world, found)


def plate_beside(rng: np.random.Generator, world: World) -> Found | None:
    found = []
    for one in world.named:
        beside = [plate for plate in world.scene.plates if plate.beside(one)]
        if len(beside) == 1 and beside[0].word in world.askable:
            found.append(({"name": one.name}, beside[0].word))
    return _with_words(rng, world, found)


def more(rng: np.random.Generator, world: World) -> Found | None:
    kind, other = _kind(rng, world), _kind(rng, world)
    first, second = len(world.of(kind)), len(world.of(other))
    if first == second:
        return None
    return {"kinds": _many(kind), "others": _many(other)}, *_yes(first > second)


def odd(rng: np.random.Generator, world: World) -> Found | None:
    """Three of a kind that are there, and one that is of another."""
    for kind in _shuffled(rng, COUNTED):
        same = [one for one in world.named if one.kind == kind]
        other = [one for one in world.named if one.kind != kind and one.kind in COUNTED]
        if len(same) >= 3 and other:
            names = [one.name for one in _shuffled(rng, same)[:3]]
            stranger = _one(rng, other).name
            listed = _shuffled(rng, [*names, stranger])
            return {"list": f"{', '.join(listed[:3])} or {listed[3]}"}, stranger, names
    return None


def beside_count(rng: np.random.Generator, world: World) -> Found | None:
    """How many of a kind stand beside something of another."""
    kind, near = _kind(rng, world), _kind(rng, world)
    if kind == near or not world.of(near):
        return None
    counted = sum(any(one.beside(other) for other in world.of(near)) for one in world.of(kind))
    return {"kinds": _many(kind), "other": a(KINDS[near][0])}, *_number(counted)


def larger_count(rng: np.random.Generator, world: World) -> Found | None:
    if not world.named:
        return None
    than = _one(rng, world.named)
    return {"name": than.name}, *_number(sum(one.size > than.size for one in world.scene.things))


def below_count(rng: np.random.Generator, world: World) -> Found | None:
    """How many of a kind stand in a lower row than a plate."""
    if not world.plates:
        return None
    plate, kind = _one(rng, world.plates), _kind(rng, world)
    return {"kinds": _many(kind), "word": plate.word}, *_number(sum(one.row > plate.row for one in world.of(kind)))


def all_left(rng: np.random.Generator, world: World) -> Found | None:
    """Whether all of a kind stand further left than a thing of another."""
    kind = _kind(rng, world)
    others = [one for one in world.named if one.kind != kind]
    if not world.of(kind) or not others:
        return None
    yes = [other for other in others if all(one.column < other.column for one in world.of(kind))]
    no = [other for other in others if other not in yes]
    if not yes or not no:
        # Where one scene has both, the question decides, and yes is as likely as no.
        return None
    holds = bool(rng.random() < 0.5)
    return {"kinds": _many(kind), "name": _one(rng, yes if holds else no).name}, *_yes(holds)


Skill = Callable[[np.random.Generator, World], Found | None]
SUMS: dict[str, Skill] = {
    "beside_count": beside_count,
    "larger_count": larger_count,
    "below_count": below_count,
    "all_left": all_left,
}
LOOKUPS: dict[str, Skill] = {
    "exists": exists,
    "count": count,
    "relation": relation,
    "larger": larger,
    "place_thing": place_thing,
    "place_word": place_word,
    "plate_beside": plate_beside,
    "more": more,
    "odd": odd,
}
SKILLS = SUMS | LOOKUPS
NAMING = ("larger_count", "all_left", "exists", "relation", "larger", "place_thing", "plate_beside", "odd")
"""Those whose question or answer names a thing."""

WORDINGS = {
    "exists": ("is there {name}?", "does the picture show {name}?", "can you see {name}?"),
    "count": ("how many {kinds} are there?", "count the {kinds}.", "how many {kinds} does the picture show?"),
    "relation": ("what is directly {relation} the {name}?", "name what stands directly {relation} the {name}."),
    "larger": (
        "which is larger, the {one} or the {other}?",
        "what is bigger in the picture, the {one} or the {other}?",
    ),
    "place_thing": ("what is {column} in the {row} row?", "what stands at the {column} place of the {row} row?"),
    "place_word": ("what is the word in the {quarter}?", "read the plate in the {quarter}."),
    "plate_beside": ("what stands on the plate beside the {name}?", "read the plate next to the {name}."),
    "more": ("are there more {kinds} than {others}?", "does the picture show more {kinds} than {others}?"),
    "odd": ("which of these does not belong: {list}?", "which is of another kind: {list}?"),
    "beside_count": ("how many {kinds} stand beside {other}?", "count the {kinds} that are next to {other}."),
    "larger_count": (
        "how many things are larger than the {name}?",
        "count the things that are bigger than the {name}.",
    ),
    "below_count": (
        "how many {kinds} are below the plate that says {word}?",
        "count the {kinds} lower than the plate {word}.",
    ),
    "all_left": ("are all the {kinds} left of the {name}?", "is the {name} right of all the {kinds}?"),
}


def ask(rng: np.random.Generator, world: World, skill: str) -> tuple[str, str] | None:
    """A question of that skill and its answer; None where the scene allows no such question."""
    found = SKILLS[skill](rng, world)
    if found is None or (skill in SUMS and found[1] == "0" and rng.random() < 0.6):
        # Most sums over few places are none, which says little.
        return None
    slots, answer, others = found
    wordings = WORDINGS[skill]
    question = wordings[int(rng.integers(len(wordings)))].format(**slots)
    if not others or rng.random() >= CHOICE_SHARE:
        return question, answer
    options = _shuffled(rng, [answer, *_shuffled(rng, others)[: len(LETTERS) - 1]])
    listed = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
    return f"{question}\n{listed}\nAnswer with the letter.", LETTERS[options.index(answer)]


def caption(rng: np.random.Generator, scene: Scene) -> str:
    """Everything with its place, row by row, from the top or from the bottom."""
    rows = range(PLACES)
    told = []
    for row in rows if rng.random() < 0.5 else reversed(rows):
        here = [
            f"{ORDINALS[one.column]} {a(one.name) if one.thing else f'a plate that says {one.word}'}"
            for one in scene.placed
            if one.row == row
        ]
        told.append(f"{ROWS[row]} row: {', '.join(here) or 'nothing'}")
    return "; ".join(told)


def _with_names(rng: np.random.Generator, world: World, found: list[tuple[dict[str, str], str]]) -> Found | None:
    if not found:
        return None
    slots, answer = _one(rng, found)
    return slots, answer, [one.name for one in world.scene.things if one.name not in (answer, slots.get("name"))]


def _with_words(rng: np.random.Generator, world: World, found: list[tuple[dict[str, str], str]]) -> Found | None:
    if not found:
        return None
    slots, answer = _one(rng, found)
    return slots, answer, [one.word for one in world.scene.plates if one.word != answer]


def _number(value: int) -> tuple[str, list[str]]:
    return str(value), [str(other) for other in range(max(0, value - 2), value + 3) if other != value]


def _yes(holds: bool) -> tuple[str, list[str]]:
    return ("yes", ["no"]) if holds else ("no", ["yes"])


def _kind(rng: np.random.Generator, world: World) -> str:
    """Mostly one that is there."""
    present = sorted({one.kind for one in world.scene.things if one.kind in COUNTED})
    return _one(rng, present) if present and rng.random() < 0.85 else _one(rng, COUNTED)


def _at(scene: Scene, row: int, column: int) -> Placed | None:
    return next((one for one in scene.placed if (one.row, one.column) == (row, column)), None)


def a(name: str) -> str:
    """With its article."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _many(kind: str) -> str:
    return KINDS[kind][1]


def _one(rng: np.random.Generator, many):
    return many[int(rng.integers(len(many)))]


def _shuffled(rng: np.random.Generator, many: Iterable) -> list:
    listed = list(many)
    return [listed[i] for i in rng.permutation(len(listed))]
