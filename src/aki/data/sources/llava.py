"""LLaVA-style JSON: conversations of human and gpt about a picture. LLaVA-Instruct's images: COCO train2017."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from random import Random
from typing import Any, ClassVar

from aki.data.augment import View
from aki.data.schema import assistant
from aki.data.sources.base import Source, said
from aki.data.sources.files import Columns, Row, json_items

MARK = "<image>"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


class LlavaConversations(Source):
    """Whole conversations, their pictures before the first question."""

    COLUMNS: ClassVar[Columns] = {"images": ["string"], "system": "string", "turns": ["string"]}

    def entries(self, *files: Path) -> Iterator[Row]:
        return chain.from_iterable(json_items(file) for file in files)

    def parse(self, entry: Row) -> Iterator[Row]:
        images = entry.get("image") or []
        images = [images] if isinstance(images, str) else images
        turns = [(turn["from"], turn["value"]) for turn in entry["conversations"]]
        system = turns.pop(0)[1] if turns and turns[0][0] == "system" else None
        check_turns([role for role, _ in turns])
        marks = sum(text.count(MARK) for _, text in turns)
        if marks > len(images):
            raise ValueError(f"{marks} {MARK} and {len(images)} image(s)")
        texts = [text.replace(MARK, "").strip() for _, text in turns]
        name = str(entry.get("id", images[0] if images else ""))
        yield from self.split({"id": name, "images": images, "system": system, "turns": texts})

    def split(self, whole: Row) -> Iterator[Row]:
        """The samples of a conversation."""
        yield whole

    def chat(self, row: Row, rng: Random, view: View | None) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = []
        if row["system"]:
            messages.append({"role": "system", "content": [{"type": "text", "text": row["system"]}]})
        images: list[dict[str, Any]] = [{"type": "image", "image": image} for image in row["images"]]
        for question, answer in zip(row["turns"][::2], row["turns"][1::2], strict=True):
            asked = {"type": "text", "text": said(question, "question")}
            messages += [{"role": "user", "content": [*images, asked]}, assistant(said(answer, "answer"))]
            images = []
        return messages


class LlavaPairs(LlavaConversations):
    """Each question and its answer is a sample of its own, with the pictures."""

    def split(self, whole: Row) -> Iterator[Row]:
        turns = whole["turns"]
        for start in range(0, len(turns), 2):
            yield {**whole, "id": f"{whole['id']}-{start // 2}", "turns": turns[start : start + 2]}


class LlavaInstruct(LlavaPairs):
    FILES = ("llava_instruct_150k.json",)


def check_turns(speakers: list[str]) -> None:
    """
    Raises:
        ValueError: it is not question, answer, question, answer, ...
        KeyError: somebody unknown speaks.
    """
    roles = [ROLES[speaker] for speaker in speakers]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise ValueError(f"the turns are {', '.join(speakers) or 'missing'}, not human, gpt, human, gpt, ...")
