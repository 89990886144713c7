"""Scenes of real things, with things made by the tests."""

import re
from collections import Counter

import numpy as np
import pytest
from stamps import NAMES, write_stamps

from aki.data.mixture import Mixture
from aki.data.scenes import questions
from aki.data.scenes.questions import ORDINALS, ROWS, SKILLS, World, ask
from aki.data.scenes.scene import CELL, SIDES, Placed, Scene
from aki.data.scenes.things import Thing, read_things
from aki.data.schema import text_of
from aki.data.sources import SourceError, open_source
from aki.data.sources.scenes import Scenes


@pytest.fixture(scope="session")
def stamps(tmp_path_factory):
    return write_stamps(tmp_path_factory.mktemp("stamps"))


def test_names_come_from_captions(stamps):
    assert {thing.name for thing in read_things([stamps])} == {
        name for names in NAMES.values() for name in names.split()
    }


def test_a_sample_depends_on_its_number_alone(stamps):
    one, again = Scenes(stamps), Scenes(stamps)
    for index in (0, 5, 12):
        assert one.sample(index).question == again.sample(index).question
        pictures = [np.asarray(s.sample(index).messages[0]["content"][0]["image"]) for s in (one, again)]
        assert np.array_equal(*pictures)
        assert pictures[0].shape == (192, 192, 3)
    assert one.sample(0).question != Scenes(stamps, seed=1).sample(0).question


def thing(name, kind):
    return Thing(name, kind, ("-",))


CAT, DOG, CAR, PIE = thing("cat", "animals"), thing("dog", "animals"), thing("car", "vehicles"), thing("pie", "food")
#   .    cat  car  .
#   dog  .    .    "ink"
#   pie  .    .    .
#   .    .    .    .
HAND_MADE = Scene(
    (
        Placed(0, 1, CAT, size=0),
        Placed(0, 2, CAR, size=2),
        Placed(1, 0, DOG, size=1),
        Placed(1, 3, word="ink"),
        Placed(2, 0, PIE, size=1),
    ),
    ground=0,
)


@pytest.mark.parametrize(
    ("skill", "pattern", "answer"),
    [
        ("beside_count", r"how many animals stand beside a vehicle\?", "1"),
        ("beside_count", r"how many vehicles stand beside an animal\?", "1"),
        ("larger_count", r"how many things are larger than the dog\?", "1"),
        ("larger_count", r"how many things are larger than the cat\?", "3"),
        ("below_count", r"how many foods are below the plate that says ink\?", "1"),
        ("below_count", r"how many animals are below the plate that says ink\?", "0"),
        ("all_left", r"are all the animals left of the car\?", "yes"),
        ("count", r"how many animals are there\?", "2"),
        ("relation", r"what is directly right of the cat\?", "car"),
        ("larger", r"which is larger, the (cat or the dog|dog or the cat)\?", "dog"),
        ("place_thing", r"what is second in the top row\?", "cat"),
        ("place_word", r"what is the word in the top right\?", "ink"),
        ("exists", r"is there a cat\?", "yes"),
        ("more", r"are there more animals than foods\?", "yes"),
    ],
)
def test_answers_are_those_that_a_person_gives(skill, pattern, answer):
    world = World(HAND_MADE, frozenset({"cat", "dog", "car", "pie", "ink"}))
    asked = [ask(np.random.default_rng(seed), world, skill) for seed in range(600)]
    answers = {one[1] for one in asked if one and re.fullmatch(pattern, one[0])}
    assert answers == {answer}


def test_a_choice_names_the_letter_of_the_answer():
    world = World(HAND_MADE, frozenset({"cat", "dog", "car", "pie", "ink"}))
    for seed in range(300):
        question, answer = ask(np.random.default_rng(seed), world, "larger")
        if "\n" in question:
            options = dict(line.split(". ") for line in question.splitlines()[1:-1])
            sizes = {"cat": 0, "dog": 1, "pie": 1, "car": 2}
            assert sizes[options[answer]] == max(sizes[name] for name in options.values())


def test_all_left_is_yes_as_often_as_no(stamps):
    scenes = Scenes(stamps, skills=("all_left",))
    answers = Counter(scenes.sample(index).answer for index in range(400))
    assert 0.4 < answers["yes"] / (answers["yes"] + answers["no"]) < 0.6


def test_what_is_held_out_is_never_asked_in_training(stamps):
    train, unasked = Scenes(stamps), {one.name for one in read_things([stamps]) if one.held_out}
    assert unasked
    words = set(train.words)
    assert not words & set(Scenes(stamps, part="words").words)
    texts = [train.sample(index) for index in range(650)]
    said = set(re.findall(r"[a-z]+", " ".join(f"{one.question.partition(chr(10))[0]} {one.answer}" for one in texts)))
    assert not said & unasked
    asked = [Scenes(stamps, part="things").sample(index) for index in range(40)]
    assert all(unasked & set(re.findall(r"[a-z]+", f"{one.question} {one.answer}")) for one in asked)


def test_each_part_is_measured_apart(stamps):
    for part, kinds in (("things", {"sums", "others"}), ("words", {"sums", "others"}), ("crowded", {"sums", "others"})):
        scenes = Scenes(stamps, part=part)
        assert {scenes.sample(index).skill for index in range(26)} == {f"{part}: {kind}" for kind in kinds}
    assert Scenes(stamps, part="same").sample(0).skill == "beside_count"


def test_crowded_scenes_hold_more_than_training_ever_does(stamps):
    def things(part):
        scenes = Scenes(stamps, part=part)
        rng = np.random.default_rng(0)
        return {len(scenes._scene(rng).things) for _ in range(200)}

    assert max(things("train")) == 10
    assert min(things("crowded")) == 11


def test_every_skill_is_asked_and_a_caption_names_everything(stamps):
    scenes = Scenes(stamps)
    assert {scenes.sample(index).skill for index in range(len(SKILLS))} == set(SKILLS)
    told = Scenes(stamps, task="caption")
    starts = set()
    for index in range(20):
        rows = dict(row.split(" row: ") for row in told.sample(index).answer.split("; "))
        starts.add(next(iter(rows)))
        here = {name: [] for name in ROWS}
        for one in told.scene(index).placed:
            here[ROWS[one.row]].append((ORDINALS[one.column], one.name))
        assert rows.keys() == here.keys()
        for row, said in rows.items():
            parts = [] if said == "nothing" else said.split(", ")
            assert [
                (part.split()[0], part.split(maxsplit=2)[2].removeprefix("plate that says ")) for part in parts
            ] == here[row]
    assert starts == {"top", "bottom"}


def test_a_chat_asks_more_about_the_same_picture(stamps):
    alone, several = Scenes(stamps), Scenes(stamps, turns=4)
    lengths = set()
    for index in range(30):
        one, chat = alone.sample(index).messages, several.sample(index).messages
        assert chat[:2] == one
        asked = [text_of(message) for message in chat[::2]]
        assert len(set(asked)) == len(asked)
        assert all(len(message["content"]) == 1 for message in chat[1:])
        lengths.add(len(asked))
    assert max(lengths) == 4


def test_things_stand_at_their_places(stamps):
    (cat,) = (one for one in read_things([stamps]) if one.name == "cat")
    for size, side in enumerate(SIDES):
        scene = Scene((Placed(2, 1, cat, size=size),), ground=3)
        empty = Scene((), ground=3)
        changed = np.any(np.asarray(scene.draw()) != np.asarray(empty.draw()), axis=-1)
        rows, columns = np.nonzero(changed)
        assert rows.min() >= 2 * CELL
        assert rows.max() < 3 * CELL
        assert columns.min() >= CELL
        assert columns.max() < 2 * CELL
        assert abs(rows.max() - rows.min() + 1 - side) <= 2


def test_scenes_are_a_source_of_a_recipe(stamps):
    source = open_source(
        "scenes", annotations=[stamps], images=(), seed=3, augment=None, cache=None, task="caption", size=50
    )
    assert len(source) == 50
    assert Mixture([source], np.ones(1), 0).peek(2, lambda sample: sample)[0].skill == "caption"
    blind = open_source("scenes", annotations=stamps, blind=True)
    assert [part["type"] for part in blind.sample(0).messages[0]["content"]] == ["text"]


@pytest.mark.parametrize(("options", "said"), [({"task": "sing"}, "task 'sing'"), ({"part": "moon"}, "part 'moon'")])
def test_a_wrong_option_is_named(stamps, options, said):
    with pytest.raises(SourceError, match=said):
        Scenes(stamps, **options)


def test_a_folder_without_stamps_says_what_they_are(tmp_path):
    with pytest.raises(SourceError, match="tuxpaint-stamps-default"):
        Scenes(tmp_path)


def test_the_sums_are_named_beforehand():
    assert set(questions.SUMS) == {"beside_count", "larger_count", "below_count", "all_left"}
