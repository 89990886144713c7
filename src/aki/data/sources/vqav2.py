"""VQAv2: questions in one file, answers in another. Images: COCO train2014."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any, ClassVar

from aki.data.augment import View
from aki.data.report import BadSample, Reason
from aki.data.schema import assistant, user
from aki.data.sources.base import Source, said
from aki.data.sources.files import Columns, Row, json_items
from aki.data.templates import short_answer

QUESTIONS, ANSWERS = "questions.item", "annotations.item"


class ShortAnswers(Source):
    """A picture, a question, and an answer of a word or a phrase."""

    COLUMNS: ClassVar[Columns] = {"image": "string", "question": "string", "answer": "string"}

    def chat(self, row: Row, rng: Random, view: View | None) -> list[dict[str, Any]]:
        question = short_answer(said(row["question"], "question"))
        return [user(row["image"], question), assistant(said(row["answer"], "answer"))]


class VQAv2(ShortAnswers):
    COLUMNS: ClassVar[Columns] = {**ShortAnswers.COLUMNS, "answers": ["string"]}
    FILES = ("v2_OpenEnded_mscoco_train2014_questions.json", "v2_mscoco_train2014_annotations.json")

    def entries(self, *files: Path) -> Iterator[tuple[Row, Row | None]]:
        questions, annotations = files
        answers = {
            entry.get("question_id"): {
                "answer": entry.get("multiple_choice_answer"),
                "answers": [one["answer"] for one in entry.get("answers") or []],
            }
            for entry in json_items(annotations, ANSWERS)
        }
        for entry in json_items(questions, QUESTIONS):
            yield entry, answers.get(entry.get("question_id"))

    def parse(self, entry: tuple[Row, Row | None]) -> Iterator[Row]:
        question, given = entry
        if given is None or given["answer"] is None:
            raise BadSample(Reason.MALFORMED, "the question has no annotation.", id=str(question["question_id"]))
        yield {
            "id": str(question["question_id"]),
            "image": f"COCO_train2014_{question['image_id']:012}.jpg",
            "question": question["question"],
            **given,
        }
