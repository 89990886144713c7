from random import Random

import pytest

from aki.data.templates import letter, region, short_answer, yes_or_no


def test_texts_to_the_character():
    assert short_answer("Why {x}?") == "Answer the question using a single word or phrase. Why {x}?"
    assert yes_or_no("Is it?") == "Answer the question using a single word or phrase. Is it? Please answer yes or no."
    assert region((0, 0.12345, 0.5, 1)) == (
        "Provide a short description for this region. <bbox>[0.000, 0.123][0.500, 1.000]</bbox>"
    )


def test_letters_to_the_character():
    question, answer = letter("Why?", ["only"], 0, Random(0))
    assert question == "Answer with the option's letter from the given choices directly. Why?\nOptions:\nA. only\n"
    assert answer == "A"
    question, _ = letter("Why?", ["only"], 0, Random(0), hint="N/A")
    assert question == (
        "Answer with the option's letter from the given choices directly. Why?\nContext: N/A\nOptions:\nA. only\n"
    )


def test_every_order_of_options_comes_and_the_letter_follows_the_right_one():
    answers, orders = [], set()
    for seed in range(600):
        question, answer = letter("Q", ["red", "green", "blue"], 1, Random(seed))
        lines = question.split("Options:\n")[1].splitlines()
        assert f"{answer}. green" in lines
        answers.append(answer)
        orders.add(tuple(line[3:] for line in lines))
    assert len(orders) == 6
    assert all(150 < answers.count(name) < 250 for name in "ABC")


def test_choices_that_have_no_letter_are_refused():
    for choices, answer in ((["a"], 1), (["a"], -1), ([], 0), (["x"] * 27, 0)):
        with pytest.raises(ValueError, match="cannot be asked for by letter"):
            letter("Q", choices, answer, Random(0))
