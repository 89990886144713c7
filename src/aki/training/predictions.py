"""What a model answers to questions whose answers are known, and what knowing nothing would score."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from aki.data.collate import ChatCollator
from aki.data.schema import Sample, text_of
from aki.files import replacing
from aki.metrics import Metric, exact
from aki.models.explain import chat_inputs
from aki.prompts.blocks import PromptBlockWriter

PREDICTIONS = "predictions.jsonl"
_MEDIA = ("image", "video", "audio")

Prediction = dict[str, Any]
"""id, question, pictures, gold, golds (where people gave several), answer, right (0 to 1), source, skill."""


@dataclass(frozen=True)
class WithoutMedia(Dataset):
    """The same questions without their pictures: what a model knows of the answers without looking."""

    questions: Dataset[Sample]

    def __len__(self) -> int:
        return len(self.questions)  # type: ignore[arg-type]

    def __getitem__(self, number: int) -> Sample:
        sample = self.questions[number]
        messages = [
            {**message, "content": [part for part in message["content"] if part["type"] not in _MEDIA]}
            for message in sample.messages
        ]
        return replace(sample, messages=messages)


def majority(golds: Sequence[Sequence[str]], groups: Sequence[str], metric: Metric = exact) -> dict[str, float]:
    """The score of always giving the most common answer of the question's skill (or source): `accuracy` and each's.

    Args:
        golds: the right answers to each question.
        groups: the skill, or source, of each question.
    """
    by_group: dict[str, list[Sequence[str]]] = defaultdict(list)
    for gold, group in zip(golds, groups, strict=True):
        by_group[group].append(gold)
    scores: dict[str, list[float]] = {}
    for group, own in by_group.items():
        common = Counter(answer for gold in own for answer in gold).most_common(1)[0][0]
        scores[group] = [metric(common, gold) for gold in own]
    return summary((score, group) for group, own in scores.items() for score in own)


def summary(scored: Iterable[tuple[float, str]]) -> dict[str, float]:
    """(score, skill or source) of each question -> `accuracy`, the mean of all, and that of each."""
    scored = list(scored)
    return {"accuracy": sum(score for score, _ in scored) / len(scored)} | means_by_group(scored)


def means_by_group(scored: Iterable[tuple[float, str]]) -> dict[str, float]:
    """(score, skill or source) of each question -> the mean of each skill or source."""
    groups: dict[str, list[float]] = defaultdict(list)
    for score, group in scored:
        groups[group].append(score)
    return {group: sum(scores) / len(scores) for group, scores in groups.items()}


def group_of(sample: Sample) -> str:
    return sample.skill or sample.source


def described(sample: Sample, answer: str, score: float) -> Prediction:
    parts = [part for message in sample.messages for part in message["content"]]
    pictures = [part.get("image", part.get("video", part.get("audio"))) for part in parts if part["type"] in _MEDIA]
    return {
        "id": sample.id,
        "question": "\n".join(map(text_of, sample.messages[:-1])),
        # Those that were drawn have no file.
        "pictures": [str(one) if isinstance(one, str | Path) else None for one in pictures],
        "gold": sample.answer,
        **({"golds": list(sample.answers)} if sample.answers else {}),
        "answer": answer,
        "right": score,
        "source": sample.source,
        "skill": sample.skill,
    }


@torch.inference_mode()
def answers(
    model: Any, collator: ChatCollator, samples: Sequence[Sample], batch_size: int, max_new_tokens: int
) -> Iterator[list[str]]:
    """Greedy answers to the last turn of each sample, a batch at a time.

    Args:
        collator: whose processor and template write the prompts.

    Raises:
        BadSample: a picture that cannot be used.
    """
    processor: Any = collator.processor
    template = {} if collator.template is None else {"chat_template": collator.template}
    plain = processor.wrapped if isinstance(processor, PromptBlockWriter) else processor
    for start in range(0, len(samples), batch_size):
        chats = [collator.opened(one).messages[:-1] for one in samples[start : start + batch_size]]
        inputs = chat_inputs(plain, chats, **template).to(model.device)
        if inputs.get("pixel_values") is not None and inputs["pixel_values"].is_floating_point():
            inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        out = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=processor.tokenizer.pad_token_id,
        )
        said = processor.tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        yield [text.strip() for text in said]


def write_predictions(
    path: Path, model: Any, collator: ChatCollator, samples: Sequence[Sample], right: Sequence[bool], batch_size: int
) -> None:
    """What a trained model answers to the questions that it was measured by, a line of JSON each.

    Args:
        right: of each question, whether it was answered rightly, and is not asked again.
    """
    wrong = [sample for sample, ok in zip(samples, right, strict=True) if not ok]
    # One by one, because a tokenizer takes no empty list.
    longest = max((len(collator.processor.tokenizer(one.answer)["input_ids"]) for one in wrong), default=0)
    was_training = model.training
    model.eval()
    said = (text for batch in answers(model, collator, wrong, batch_size, longest + 1) for text in batch)
    with replacing(path) as partial, partial.open("w", encoding="utf-8") as file:
        for sample, ok in zip(samples, right, strict=True):
            line = described(sample, sample.answer if ok else next(said), float(ok))
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    model.train(was_training)
