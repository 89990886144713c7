"""Questions of the user's own: what a model answers, and how that scores."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from aki.data.collate import ChatCollator
from aki.data.mixture import Samples
from aki.data.report import DataReport
from aki.data.schema import Sample
from aki.data.sources import open_source
from aki.evaluation.answers import key_of
from aki.evaluation.fingerprints import model_fingerprint
from aki.evaluation.tables import OWN
from aki.files import replacing, write_json
from aki.metrics import METRICS
from aki.models import AkiProcessor
from aki.prompts import write_prompt_blocks
from aki.training.data import stage_collators
from aki.training.held_out import Chosen, held_out, usable
from aki.training.predictions import (
    PREDICTIONS,
    Prediction,
    WithoutMedia,
    answers,
    described,
    group_of,
    majority,
    summary,
)
from aki.training.recipe import Recipe

BLIND = "blind.jsonl"
_NO_LIMIT = 1 << 20
"""Tokens."""
_KINDS = {".jsonl": "messages", ".json": "llava_conversations"}
_COLUMNS = {name: name for name in ("image", "question", "answer")}


def opened(file: Path, images: Path | None) -> Samples:
    """A file of questions: chats (.jsonl), LLaVA's JSON, or a table with columns image, question, answer.

    Args:
        images: the folder of its pictures; the file's own if absent.

    Raises:
        SourceError: it is not there, or not what it should be.
    """
    kind = _KINDS.get(file.suffix, "datasets")
    options = {} if kind != "datasets" else {"columns": _COLUMNS}
    folder = (images or file.parent).resolve()
    return open_source(kind, annotations=[file.resolve()], images=[folder], name=file.stem, **options)


def collator_of(model: Any, processor: Any, recipe: Recipe | None) -> ChatCollator:
    """What writes the prompts, as the recipe's SFT wrote them, and no longer than the model's context."""
    writer = processor if isinstance(processor, AkiProcessor) else write_prompt_blocks(processor)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or _NO_LIMIT
    if recipe is None:
        return ChatCollator(writer, context)
    collator = stage_collators(writer, recipe.stage("sft"))[0]
    return replace(collator, max_length=min(collator.max_length, context))


def questions_of(
    asked: Recipe | Samples, collator: ChatCollator, limit: int | None
) -> tuple[list[Sample], DataReport | None]:
    """The questions that a recipe holds out for the final numbers, or all of a source; and what was skipped.

    Raises:
        ValueError: there are none.
        SourceError, TooManyBadSamples: of the data.
    """
    if isinstance(asked, Recipe):
        found = held_out(asked, asked.stage("sft"), collator)
        if found is None:
            raise ValueError("the recipe holds no questions out: name their sources in data.held_out.")
        chosen, report = found.test, found.report
    else:
        report = DataReport()
        picks = [(0, index) for index in range(len(asked)) if usable(asked, index, collator, report)]
        report.check()
        if not picks:
            raise ValueError(f"there is no question to ask: {report.summary()}.")
        chosen = Chosen([asked], picks)
    numbers = islice(range(len(chosen)), limit)  # type: ignore[arg-type]
    return [chosen[number] for number in numbers], report


def ask(
    model: Any,
    collator: ChatCollator,
    samples: Sequence[Sample],
    file: Path,
    metric: str,
    batch_size: int,
    max_new_tokens: int,
    title: str = "answers",
) -> list[Prediction]:
    """The predictions, written to `file` a batch at a time; those that are there from a call before stay.

    Raises:
        ValueError: the file holds answers to other questions.
    """
    score, kept = METRICS[metric], _kept(file)
    asked = [described(sample, "", 0.0) for sample in samples]
    if [line | {"answer": "", "right": 0.0} for line in kept] != asked[: len(kept)]:
        raise ValueError(f"{file} holds answers to other questions: choose another --output, or remove it.")
    file.parent.mkdir(parents=True, exist_ok=True)
    _write(file, kept)  # without what a kill cut off, which the next line would join
    rest = samples[len(kept) :]
    with (
        file.open("a", encoding="utf-8") as written,
        tqdm(total=len(samples), initial=len(kept), desc=title, unit="answer", disable=not rest) as bar,
    ):
        left = iter(rest)
        for batch in answers(model, collator, rest, batch_size, max_new_tokens):
            for said in batch:
                sample = next(left)
                kept.append(described(sample, said, score(said, sample.golds)))
                written.write(json.dumps(kept[-1], ensure_ascii=False) + "\n")
            written.flush()
            bar.update(len(batch))
    for line, sample in zip(kept, samples, strict=True):
        line["right"] = score(line["answer"], sample.golds)
    _write(file, kept)
    return kept


def measure(
    model: Any,
    collator: ChatCollator,
    samples: Sequence[Sample],
    output: Path,
    settings: dict[str, Any],
    report: DataReport | None,
) -> dict[str, Any]:
    """Ask with and without the pictures, and write `predictions.jsonl`, `blind.jsonl` and `results.json`.

    Args:
        settings: name, model, metric, batch_size, max_new_tokens, rule, dtype, backend.
    """
    known = output / "asked.json"
    about = {name: settings[name] for name in ("model", "rule", "dtype", "backend", "max_new_tokens")}
    about["template"] = key_of(collator.template, getattr(collator.processor, "chat_template", None))
    about["checkpoint"] = model_fingerprint(settings["model"], getattr(model.config, "_commit_hash", None))
    then = json.loads(known.read_text()) if known.exists() else about
    other = [name for name in about if then.get(name) != json.loads(json.dumps(about[name]))]
    if known.exists() and other:
        raise ValueError(f"{output} holds answers made with another {', '.join(other)}: choose another --output.")
    output.mkdir(parents=True, exist_ok=True)
    write_json(known, about)
    options = {name: settings[name] for name in ("metric", "batch_size", "max_new_tokens")}
    seen = ask(model, collator, samples, output / PREDICTIONS, **options)
    blind = WithoutMedia(samples)  # type: ignore[arg-type]
    unseen = [blind[number] for number in range(len(blind))]
    guessed = ask(model, collator, unseen, output / BLIND, **options, title="without pictures")
    groups = [group_of(sample) for sample in samples]
    score = METRICS[settings["metric"]]
    results = {
        "suite": OWN,
        "name": settings["name"],
        "settings": about | options,
        "questions": len(samples),
        "skipped": None if report is None else report.summary(),
        "scores": summary(zip((line["right"] for line in seen), groups, strict=True)),
        "blind": summary(zip((line["right"] for line in guessed), groups, strict=True)),
        "majority": majority([sample.golds for sample in samples], groups, score),
    }
    write_json(output / "results.json", results)
    return results


def own_table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row a model, then what can be had without looking; a column a skill or source, in percent.

    Raises:
        ValueError: they were scored by different metrics.
    """
    metrics = {one["settings"]["metric"] for one in results}
    if len(metrics) > 1:
        raise ValueError(f"these results are by different metrics ({', '.join(sorted(metrics))}): score them alike.")
    columns = list(dict.fromkeys(name for one in results for name in one["scores"]))
    names = ["all" if name == "accuracy" else name for name in columns]
    lines = [
        f"| {metrics.pop()}, % | questions | " + " | ".join(names) + " |",
        "| --- |" + " ---: |" * (len(names) + 1),
    ]
    for title, key in (("{}", "scores"), ("{}, asked without the picture", "blind")):
        lines += [_row(title.format(one["name"]), one["questions"], one[key], columns) for one in results]
    for asked in {json.dumps(one["majority"]): one for one in results}.values():
        lines.append(_row("majority answer of each", asked["questions"], asked["majority"], columns))
    return "\n".join(lines)


def _row(title: str, questions: int, scores: dict[str, float], columns: Sequence[str]) -> str:
    cells = [f"{100 * scores[name]:.1f}" if name in scores else "" for name in columns]
    return f"| {title} | {questions:,} | " + " | ".join(cells) + " |"


def on_its_device(model: Any) -> Any:
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _write(file: Path, lines: Sequence[Prediction]) -> None:
    with replacing(file) as partial:
        partial.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def _kept(file: Path) -> list[Prediction]:
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8").split("\n")
    # A line that was cut off by a kill has no end.
    return [json.loads(line) for line in lines[:-1]]
