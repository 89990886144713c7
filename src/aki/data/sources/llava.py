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
    """Whole conversations. A picture stands at its mark, in the turn that has it; those without a mark come first."""

    COLUMNS: ClassVar[Columns] = {"images": ["string"], "system": "string", "turns": ["string"]}
    VERSION: ClassVar[int] = 2

    def entries(self, *files: Path) -> Iterator[Row]:
        return chain.from_iterable(json_items(file) for file in files)

    def parse(self, entry: Row) -> Iterator[Row]:
        images = entry_images(entry)
        turns = [(turn["from"], turn["value"]) for turn in entry["conversations"]]
        system = turns.pop(0)[1] if turns and turns[0][0] == "system" else None
        check_turns([role for role, _ in turns])
        texts = [text for _, text in turns]
        asked, elsewhere = sum(map(_marks, texts[::2])), sum(map(_marks, [system or "", *texts[1::2]]))
        if elsewhere:
            raise ValueError(f"{elsewhere} {MARK} outside of the questions")
        if asked not in (0, len(images)):
            raise ValueError(f"{asked} {MARK} and {len(images)} image(s)")
        name = str(entry.get("id", images[0] if images else ""))
        yield from self.split({"id": name, "images": images, "system": system, "turns": texts})

    def split(self, whole: Row) -> Iterator[Row]:
        """The samples of a conversation."""
        yield whole

    def asked(self, question: str, images: list[Row]) -> Iterator[Row]:
        """The parts of a question: its texts, and between them a picture for each mark."""
        for number, text in enumerate(question.split(MARK)):
            if text.strip():
                yield {"type": "text", "text": text.strip()}
            yield from images[number : number + 1]

    def chat(self, row: Row, rng: Random, view: View | None) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = []
        if row["system"]:
            messages.append({"role": "system", "content": [{"type": "text", "text": row["system"]}]})
        questions, answers = row["turns"][::2], row["turns"][1::2]
        images: list[Row] = [{"type": "image", "image": image} for image in row["images"]]
        unmarked = len(images) - sum(map(_marks, questions))
        first, images = images[:unmarked], images[unmarked:]
        for question, answer in zip(questions, answers, strict=True):
            said(question.replace(MARK, ""), "question")
            own, images = images[: _marks(question)], images[_marks(question) :]
            content = [*first, *self.asked(question, own)]
            messages += [{"role": "user", "content": content}, assistant(said(answer, "answer"))]
            first = []
        return messages


class LlavaPairs(LlavaConversations):
    """Each question and its answer is a sample of its own, with the pictures that were shown by then."""

    def split(self, whole: Row) -> Iterator[Row]:
        turns, images = whole["turns"], whole["images"]
        shown = len(images) - sum(map(_marks, turns))
        for start in range(0, len(turns), 2):
            shown += _marks(turns[start])
            pair = {"id": f"{whole['id']}-{start // 2}", "images": images[:shown], "turns": turns[start : start + 2]}
            yield {**whole, **pair}


class LlavaInstruct(LlavaPairs):
    """The release writes the one mark before or behind the first question, by chance: the picture is first."""

    FILES = ("llava_instruct_150k.json",)

    def asked(self, question: str, images: list[Row]) -> Iterator[Row]:
        return super().asked(MARK * len(images) + question.replace(MARK, ""), images)


def entry_images(entry: Row) -> list[str]:
    """The names of an entry's pictures.

    Raises:
        ValueError: there are two lists that differ, or a video.
    """
    listed = [entry[key] for key in ("image", "images") if entry.get(key)]
    names = [[one] if isinstance(one, str) else one for one in listed]
    if len(names) == 2 and names[0] != names[1]:
        raise ValueError("image and images name different pictures")
    if entry.get("video"):
        raise ValueError("it has a video, which this source does not read")
    return names[0] if names else []


def _marks(text: str) -> int:
    return text.count(MARK)


def check_turns(speakers: list[str]) -> None:
    """
    Raises:
        ValueError: it is not question, answer, question, answer, ...
        KeyError: somebody unknown speaks.
    """
    roles = [ROLES[speaker] for speaker in speakers]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise ValueError(f"the turns are {', '.join(speakers) or 'missing'}, not human, gpt, human, gpt, ...")
