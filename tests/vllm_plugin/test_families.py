"""Every family answers in vLLM as in transformers under the same rule, in one batch with text alone."""

import json
import os
from pathlib import Path

import pytest
from asking import QUESTIONS, Reference, answers, engine, same
from folders import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_answers_as_in_transformers(family, tmp_path, record_answers):
    folder = FAMILIES[family](tmp_path / "model")
    reference = Reference(folder)
    expected = [reference.answer(question, "mma") for question in QUESTIONS]
    causal = [reference.answer(question, None) for question in QUESTIONS]
    shown = [i for i, question in enumerate(QUESTIONS) if question.pictures]
    # The rule has something to say here, or nothing would be tested.
    assert not any(same(expected[i], causal[i]) for i in shown)

    with engine(folder, "mma") as llm:
        found = answers(llm, reference, QUESTIONS)
        again = answers(llm, reference, QUESTIONS)
    agree = [same(a, b) for a, b in zip(found, expected, strict=True)]
    cached = [same(a, b) for a, b in zip(again, expected, strict=True)]
    record_answers(family, all(agree), all(cached))
    assert agree == [True] * len(QUESTIONS)
    assert cached == [True] * len(QUESTIONS)


@pytest.fixture
def record_answers():
    """For docs/unlock_vllm.py, which makes the table from this run."""

    def record(family: str, agrees: bool, cached: bool) -> None:
        file = os.environ.get("AKI_VLLM_TABLE")
        if file:
            with Path(file).open("a") as out:
                out.write(json.dumps({"family": family, "agrees": agrees, "cached": cached}) + "\n")

    return record
