"""The paper's twelve columns as lmms-eval tasks: which metric of which task, on which split, and how it is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lmms_eval.tasks
from tenacity import RetryError

SHORT_ANSWER = "Answer the question using a single word or phrase."
OPTION_LETTER = "Answer with the option's letter from the given choices directly."


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        name: as the paper prints it.
        task: lmms-eval's name of the task.
        metric: the task's metric; `scale` brings it into the paper's range, 0 to `best`.
        split: the data set's split that the task reads.
        judged: whether a judge model decides the score.
        changes: fields of the task's configuration that differ from lmms-eval's, each for the reason beside it.
    """

    name: str
    task: str
    metric: str
    split: str
    best: float = 100.0
    scale: float = 1.0
    judged: bool = False
    changes: dict[str, Any] = field(default_factory=dict)


def instruction_first(text: str) -> str:
    """The question with its instruction before it, as AKI was trained (paper, section 4) and asked.

    lmms-eval writes the same two sentences after the question.
    """
    for sentence in (SHORT_ANSWER, OPTION_LETTER):
        if text.rstrip().endswith(sentence):
            return f"{sentence} {text.rstrip().removesuffix(sentence).strip()}"
    return text


def ask_instruction_first(doc_to_text: Callable[..., str], doc: dict, lmms_eval_specific_kwargs: dict | None = None):
    """A task's own `doc_to_text`, the instruction moved to the front."""
    options = () if lmms_eval_specific_kwargs is None else (lmms_eval_specific_kwargs,)
    return instruction_first(doc_to_text(doc, *options))


def ask_messages_instruction_first(doc_to_messages: Callable[..., list], doc: dict, lmms_eval_specific_kwargs: dict):
    """A task's own `doc_to_messages` (pictures within the text): the instruction goes before the first text."""
    messages = doc_to_messages(doc, lmms_eval_specific_kwargs)
    texts = [part for part in messages[-1]["content"] if part["type"] == "text"]
    asked = instruction_first(texts[-1]["text"])
    for sentence in (SHORT_ANSWER, OPTION_LETTER):
        if asked.startswith(sentence) and asked != texts[-1]["text"]:
            texts[-1]["text"] = asked.removeprefix(sentence).strip()
            texts[0]["text"] = f"{sentence} {texts[0]['text']}"
    messages[-1]["content"] = [p for p in messages[-1]["content"] if p["type"] != "text" or p["text"]]
    return messages


def images_alone(split: Any) -> Any:
    """SEED-Bench's image questions: SEED-I is scored on these, and its videos are pictures by the eight."""
    return split.select([i for i, kind in enumerate(split["data_type"]) if kind == "image"])


def whole_precision(split: Any) -> Any:
    """MathVista's precision as a whole number: with the hub's 1.0 lmms-eval cannot round, and floats score nothing."""
    from datasets import Value

    return split.cast_column("precision", Value("int64"))


def mean_over_sources(results: list[dict[str, Any]]) -> float:
    """CV-Bench 2D: the mean of the accuracies on ADE20K and COCO, as the benchmark and the paper define it."""
    sources = {result["source"] for result in results}
    right = [[result["is_correct"] for result in results if result["source"] == source] for source in sources]
    return sum(sum(of_source) / len(of_source) for of_source in right) / len(right)


def a_score_or_nothing(ask: Callable[..., tuple[str, str]], prompt: str, **_: Any) -> tuple[str, str]:
    """MM-Vet's question to the judge; a reply that is no number from 0 to 1, at four temperatures, is no reply.

    lmms-eval asks without end after a number beyond that range, and counts four replies of other words as a score of 0.
    """
    for temperature in (0.0, 0.5, 1.0, 1.5):
        said, judge = ask(prompt, temperature=temperature)
        try:
            if not said or 0 <= float(said.split(" ")[0]) <= 1:
                return said, judge
        except ValueError:
            continue
    return "", ""


_CV_BENCH_ASKED = {"lmms_eval_specific_kwargs": {"default": {"pre_prompt": OPTION_LETTER, "post_prompt": ""}}}
"""lmms-eval's own sentence here is another one, with the letters in it; the training's is used throughout."""

PAPER = (
    Column("MME-P", "mme", "mme_perception_score", "test", best=2000),
    Column("MME-C", "mme", "mme_cognition_score", "test", best=800),
    Column("MMB", "mmbench_en_dev_static", "gpt_eval_score", "dev"),
    Column("SEED-I", "seedbench", "seed_image", "test", scale=100, changes={"process_docs": images_alone}),
    Column("LLaVA-W", "llava_in_the_wild", "gpt_eval_llava_all", "train", judged=True),
    Column("MMMU", "mmmu_val", "mmmu_acc", "validation", scale=100),
    Column(
        "MathV-mini",
        "mathvista_testmini_format",
        "llm_as_judge_eval",
        "testmini",
        judged=True,
        changes={"process_docs": whole_precision},
    ),
    # VLMEvalKit's overall score of POPE is F1, so the paper's column is.
    Column("POPE", "pope", "pope_f1_score", "test", scale=100),
    Column(
        "MM-Vet",
        "mmvet",
        "gpt_eval_score",
        "test",
        judged=True,
        changes={
            # lmms-eval asks for reasoning step by step; the benchmark and the paper ask the question alone.
            "lmms_eval_specific_kwargs": {"default": {"pre_prompt": "", "post_prompt": ""}},
            # Its temperature of 0.2 goes with do_sample: false, which is greedy; 0 says so.
            "generation_kwargs": {"max_new_tokens": 1024, "temperature": 0, "do_sample": False},
        },
    ),
    Column("RealWorldQA", "realworldqa", "exact_match", "test", scale=100),
    Column(
        "CV-Bench 2D",
        "cv_bench_2d",
        "cv_bench_acc",
        "test",
        scale=100,
        changes=_CV_BENCH_ASKED
        | {"metric_list": [{"metric": "cv_bench_acc", "aggregation": mean_over_sources, "higher_is_better": True}]},
    ),
    Column("CV-Bench 3D", "cv_bench_3d", "cv_bench_acc", "test", scale=100, changes=_CV_BENCH_ASKED),
)

DIGITS = tuple(
    Column(name, "digit_scenes", name, "test", scale=100)
    for name in ("accuracy", "read", "colour", "count_colour", "count_digit", "exists", "relation")
)

SUITES = {"paper": PAPER, "digits": DIGITS}
OWN_TASKS = Path(__file__).with_name("digit_scenes")
_FOLDERS = ("cv_bench", "llava-in-the-wild", "mathvista", "mmbench", "mme", "mmmu", "mmvet", "pope", "realworldqa")
TASK_FOLDERS = [str(Path(lmms_eval.tasks.__file__).with_name(name)) for name in (*_FOLDERS, "seedbench")]
"""Of lmms-eval, those that the suites read: an index of all its 2,000 files takes seconds."""


def columns(suite: str, only: Iterable[str] = ()) -> tuple[Column, ...]:
    """A suite's columns, those of the named tasks alone if any are named.

    Raises:
        ValueError: no such suite, or a task that is not in it.
    """
    if suite not in SUITES:
        raise ValueError(f"there is no suite {suite!r}; there are {', '.join(SUITES)}.")
    known = {column.task for column in SUITES[suite]}
    unknown = [task for task in only if task not in known]
    if unknown:
        raise ValueError(f"the suite {suite} has no task {unknown[0]!r}; it has {', '.join(sorted(known))}.")
    return tuple(column for column in SUITES[suite] if not only or column.task in set(only))


def load_task(manager: Any, column: Column, data: Path | None) -> Any:
    """The lmms-eval task of a column.

    Args:
        manager: lmms-eval's TaskManager.
        data: where `<hub path>` is the data set instead of on the hub: a copy of the hub's folder, or what `datasets`
            saved with `save_to_disk` (in a folder of the configuration's name, if it has one).

    Raises:
        ValueError: there is no such folder of data, or the data cannot be read or fetched.
    """
    config = manager._get_config(column.task)
    # Files to hand in (MMBench's Excel sheet fails on an answer with a control character, after hours) are not scores.
    scores = [metric for metric in config["metric_list"] if metric["metric"] != "submission"]
    changes = {"metric_list": scores} | column.changes
    # lmms-eval asks for a login to the hub, which none of these public data sets needs; one that is there is used.
    changes["dataset_kwargs"] = {k: v for k, v in config.get("dataset_kwargs", {}).items() if k != "token"}
    if callable(config["doc_to_text"]):
        changes["doc_to_text"] = partial(ask_instruction_first, config["doc_to_text"])
    if "doc_to_messages" in config:
        changes["doc_to_messages"] = partial(ask_messages_instruction_first, config["doc_to_messages"])
    if column.task == "mmvet":
        names = config["process_results"].__globals__
        names["get_chat_response"] = partial(a_score_or_nothing, names["get_chat_response"])
        changes["process_results"] = config["process_results"]
    path = config["dataset_path"]
    if data is not None:
        folder = data / path
        if not folder.is_dir():
            raise ValueError(f"{column.task} has no data at {folder}: put a copy of {path} there.")
        saved = folder / (config.get("dataset_name") or "")
        if (saved / "dataset_dict.json").exists():
            folder, changes["dataset_kwargs"] = saved, {"load_from_disk": True}
        changes["dataset_path"] = path = str(folder)
    try:
        loaded = manager._load_individual_task_or_group({"task": column.task, **changes}, task_type="chat")
    except RetryError as error:
        reason = error.last_attempt.exception()
        raise ValueError(f"{column.task} could not load its data from {path}: {reason}") from reason
    return loaded[column.task]
