"""GQA, balanced training questions. Images: GQA's own folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from aki.data.sources.files import Row, json_pairs
from aki.data.sources.vqav2 import ShortAnswers


class GQA(ShortAnswers):
    FILES = ("train_balanced_questions.json",)

    def entries(self, *files: Path) -> Iterator[tuple[str, Row]]:
        return json_pairs(files[0])

    def parse(self, entry: tuple[str, Row]) -> Iterator[Row]:
        key, values = entry
        yield {
            "id": key,
            "image": f"{values['imageId']}.jpg",
            "question": values["question"],
            "answer": values["answer"],
        }
