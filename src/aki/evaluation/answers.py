"""Answers that survive a kill: one line of JSON each, written as soon as its batch is done.

lmms-eval's own response cache writes when a whole run of requests has returned, which is too late for a killed one.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


class AnswerCache:
    """Answers by what decided them. Every process reads all files of the folder and writes its own.

    Args:
        folder: created if it is not there; None keeps nothing.
        rank: of this process.
    """

    def __init__(self, folder: Path | None, rank: int = 0):
        self.known: dict[str, str] = {}
        self.file: Path | None = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            for file in sorted(folder.glob("answers-*.jsonl")):
                self.known |= dict(_whole_lines(file))
            self.file = folder / f"answers-{rank}.jsonl"
            if self.file.exists() and not self.file.read_bytes().endswith(b"\n"):
                with self.file.open("a") as broken:
                    broken.write("\n")  # what comes next must not join what the kill cut off

    def get(self, key: str) -> str | None:
        return self.known.get(key)

    def add(self, answers: dict[str, str]) -> None:
        if self.file is not None:
            self.known |= answers
            with self.file.open("a") as file:
                file.writelines(json.dumps({"key": key, "answer": text}) + "\n" for key, text in answers.items())


def _whole_lines(file: Path):
    for line in file.read_text(errors="replace").splitlines():
        try:
            entry = json.loads(line)
            yield entry["key"], entry["answer"]
        except (json.JSONDecodeError, KeyError, TypeError):
            continue  # cut off by the kill


def key_of(*parts: Any) -> str:
    """A hash of values that JSON can write."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
