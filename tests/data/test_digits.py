"""DigitScenes against the scenes themselves, read by other code than that which asks."""

import re

import numpy as np
import pytest
from sklearn.datasets import load_digits

from aki.data import digits
from aki.data.digits import COLOURS, QUESTIONS, SKILLS, DigitScenes, handwriting, place_names


def test_splits_draw_disjoint_handwriting_and_leave_nothing_out():
    train, test = (np.concatenate(handwriting(split)) for split in ("train", "test"))
    assert not set(train) & set(test)
    assert set(train) | set(test) == set(range(1797))
    target = load_digits().target
    for split in ("train", "test"):
        for digit, pool in enumerate(handwriting(split)):
            assert (target[pool] == digit).all()


def test_a_scene_draws_its_own_splits_handwriting():
    for split in ("train", "test"):
        pool = set(np.concatenate(handwriting(split)))
        scenes = DigitScenes(split, "caption", 50, 24)
        assert {int(s) for i in range(50) for s in scenes.scene(i)[0].samples.ravel()} <= pool


@pytest.mark.parametrize("task", ["caption", "question"])
def test_samples_depend_on_seed_and_index_alone(task):
    one, two = DigitScenes("train", task, 40, 48), DigitScenes("train", task, 40, 48)
    list(one)  # another order of asking
    for i in (7, 3, 39):
        assert one[i].messages[0]["content"][1:] == two[i].messages[0]["content"][1:]
        assert one[i].answer == two[i].answer
        assert np.array_equal(picture(one[i]), picture(two[i]))
    other = DigitScenes("train", task, 40, 48, seed=1)
    assert any(
        one[i].answer != other[i].answer or not np.array_equal(picture(one[i]), picture(other[i])) for i in range(9)
    )


def test_train_and_test_scenes_differ():
    train, test = DigitScenes("train", "question", 5, 48), DigitScenes("test", "question", 5, 48)
    assert all(not np.array_equal(picture(train[i]), picture(test[i])) for i in range(5))


def test_pixels_are_the_handwriting_in_its_colour():
    scenes = DigitScenes("train", "caption", 3, 24)
    data = load_digits()
    for index in range(3):
        scene, _ = scenes.scene(index)
        pixels = np.asarray(scene.draw(24))
        for row in range(3):
            for column in range(3):
                ink = data.images[scene.samples[row, column]] / 16
                colour = np.array(COLOURS[scene.colours[row, column]])
                cell = pixels[8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
                assert np.abs(cell - ink[..., None] * colour).max() <= 1
                assert data.target[scene.samples[row, column]] == scene.digits[row, column]


@pytest.mark.parametrize("grid", [2, 3, 4])
def test_captions_name_every_cell_once_and_rightly(grid):
    scenes = DigitScenes("test", "caption", 20, 8 * grid, grid)
    orders = set()
    for i in range(20):
        scene, _ = scenes.scene(i)
        said = {}
        for part in scenes[i].answer.split(", "):
            place, *attributes = part.rsplit(" ", 2)
            digit, colour = sorted(attributes)
            said[place] = (colour, int(digit))
        orders.add(tuple(said))
        expected = zip(scene.colours.ravel().tolist(), scene.digits.ravel().tolist(), strict=True)
        assert said == dict(zip(place_names(grid), expected, strict=True))
    assert len(orders) > 10


@pytest.mark.parametrize("grid", [2, 3, 4])
def test_answers_are_what_the_picture_shows(grid):
    """Reads the question with a regular expression and the answer off the drawn picture's own scene, cell by cell."""
    scenes = RecordingScenes("test", "question", 600, 8 * grid, grid)
    seen = set()
    for i in range(600):
        sample = scenes[i]
        scene = scenes.drawn[-1]
        skill, slots = parse(sample.question)
        assert skill == sample.skill == SKILLS[i % len(SKILLS)]
        assert sample.answer == truth(scene, skill, slots), (sample.question, scene)
        seen.add((skill, sample.question.split(" ")[0]))
    assert len(seen) >= 3 * len(SKILLS) - 4, "the phrasings are used"


def test_existence_is_balanced_and_needs_the_pair():
    scenes = RecordingScenes("train", "question", 400, 24, skills=("exists",))
    answers = []
    for i in range(400):
        sample = scenes[i]
        answers.append(sample.answer)
        _, slots = parse(sample.question)
        scene = scenes.drawn[-1]
        if sample.answer == "no":
            assert slots["colour"] in scene.colours
            assert int(slots["digit"]) in scene.digits
    assert 0.42 < answers.count("yes") / 400 < 0.58


def test_wrong_names_are_sentences():
    with pytest.raises(ValueError, match=r"no split 'val'.*train, test"):
        DigitScenes("val", "caption", 1, 24)
    with pytest.raises(ValueError, match="no task 'vqa'"):
        DigitScenes("train", "vqa", 1, 24)
    with pytest.raises(IndexError):
        DigitScenes("train", "caption", 1, 24)[1]


class RecordingScenes(DigitScenes):
    """Keeps the scene that each sample was finally made from."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.drawn = []

    def __getitem__(self, index):
        original = digits.make_scene

        def recording(*args):
            self.drawn.append(original(*args))
            return self.drawn[-1]

        digits.make_scene = recording
        try:
            return super().__getitem__(index)
        finally:
            digits.make_scene = original


def picture(sample):
    return np.asarray(sample.messages[0]["content"][0]["image"])


def parse(question):
    slot = {
        "place": r"(?P<place>[a-z0-9 ]+?)",
        "digit": r"(?P<digit>\d)",
        "colour": "(?P<colour>red|green|blue|yellow)",
    }
    slot["relation"] = "(?P<relation>left of|right of|above|below)"
    for skill, wordings in QUESTIONS.items():
        for wording in wordings:
            match = re.fullmatch(re.escape(wording).replace(r"\{", "{").replace(r"\}", "}").format(**slot), question)
            if match:
                return skill, match.groupdict()
    raise AssertionError(f"no wording fits {question!r}")


def truth(scene, skill, slots):
    size = scene.digits.shape[0]
    cells = [(r, c, scene.colours[r, c], int(scene.digits[r, c])) for r in range(size) for c in range(size)]
    if skill in ("read", "colour"):
        row, column, colour, digit = cells[place_names(size).index(slots["place"])]
        return str(digit) if skill == "read" else colour
    if skill == "count_colour":
        return str(sum(colour == slots["colour"] for *_, colour, _ in cells))
    if skill == "count_digit":
        return str(sum(digit == int(slots["digit"]) for *_, digit in cells))
    named = [(r, c) for r, c, colour, digit in cells if (colour, digit) == (slots["colour"], int(slots["digit"]))]
    if skill == "exists":
        return "yes" if named else "no"
    assert len(named) == 1, "a relation names its digit alone"
    row, column = named[0]
    steps = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
    down, right = steps[slots["relation"]]
    assert 0 <= row + down < size
    assert 0 <= column + right < size
    return str(scene.digits[row + down, column + right])
