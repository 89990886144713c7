"""OCRVQA: questions about book covers, several a cover. Images: a folder with `{key}{extension of imageURL}`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from aki.data.sources.files import Row, json_pairs
from aki.data.sources.vqav2 import ShortAnswers

TRAIN = 1


class OCRVQA(ShortAnswers):
    FILES = ("dataset.json",)

    def entries(self, *files: Path) -> Iterator[tuple[str, Row]]:
        return json_pairs(files[0])

    def parse(self, entry: tuple[str, Row]) -> Iterator[Row]:
        key, book = entry
        if book["split"] != TRAIN:
            return
        image = key + PurePosixPath(urlsplit(book["imageURL"]).path).suffix
        pairs = list(zip(book["questions"], book["answers"], strict=True))
        for number, (question, answer) in enumerate(pairs):
            yield {"id": f"{key}-{number}", "image": image, "question": question, "answer": answer}
