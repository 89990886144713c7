"""Multiple choice by letter: A-OKVQA (images: COCO, with train2017) and ScienceQA (images: its folder, with train)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any, ClassVar

from aki.data.augment import View
from aki.data.schema import assistant, user
from aki.data.sources.base import Source, said
from aki.data.sources.files import Columns, Row, json_items, json_pairs
from aki.data.templates import letter


class Choices(Source):
    """A question, its options, and which is right; with or without a picture and a hint."""

    COLUMNS: ClassVar[Columns] = {
        "image": "string",
        "question": "string",
        "hint": "string",
        "choices": ["string"],
        "answer": "int64",
    }

    def chat(self, row: Row, rng: Random, view: View | None) -> list[dict[str, Any]]:
        choices = [said(choice, "option") for choice in row["choices"]]
        question, answer = letter(said(row["question"], "question"), choices, row["answer"], rng, row["hint"])
        return [user(row["image"], question), assistant(answer)]


class AOKVQA(Choices):
    FILES = ("aokvqa_v1p0_train.json",)

    def entries(self, *files: Path) -> Iterator[Row]:
        return json_items(files[0])

    def parse(self, entry: Row) -> Iterator[Row]:
        yield {
            "id": entry["question_id"],
            "image": f"train2017/{entry['image_id']:012}.jpg",
            "question": entry["question"],
            "hint": None,
            "choices": entry["choices"],
            "answer": right_choice(entry["correct_choice_idx"], entry["choices"]),
        }


class ScienceQA(Choices):
    FILES = ("problems.json",)

    def entries(self, *files: Path) -> Iterator[tuple[str, Row]]:
        return json_pairs(files[0])

    def parse(self, entry: tuple[str, Row]) -> Iterator[Row]:
        key, problem = entry
        if problem["split"] != "train":
            return
        image = problem["image"]
        yield {
            "id": key,
            "image": f"train/{key}/{image}" if image else None,
            "question": problem["question"],
            "hint": (problem["hint"] or "").strip() or "N/A",
            "choices": problem["choices"],
            "answer": right_choice(problem["answer"], problem["choices"]),
        }


def right_choice(index: int, choices: list[str]) -> int:
    """
    Raises:
        ValueError: there is no such choice.
    """
    if not 0 <= index < len(choices):
        raise ValueError(f"the answer is choice {index} of {len(choices)}")
    return index
