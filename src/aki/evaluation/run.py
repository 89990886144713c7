"""A model through a suite of lmms-eval's tasks, and a record of everything that can change a score."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lmms_eval import models as _models  # noqa: F401  (first, because it quiets lmms-eval's log)
from lmms_eval.api.model import lmms
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.llm_judge import Request, ServerConfig, get_server
from lmms_eval.tasks import TaskManager

from aki.evaluation.answers import key_of
from aki.evaluation.fingerprints import data_fingerprint
from aki.evaluation.lmms import decoding_of, versions
from aki.evaluation.suite import OWN_TASKS, TASK_FOLDERS, Column, load_task
from aki.files import write_json

RESULTS = "results.json"
NO_JUDGE = (
    "no judge model is set: set OPENAI_API_KEY, and OPENAI_API_URL and MODEL_VERSION for another endpoint than OpenAI's"
)


@dataclass(frozen=True)
class Evaluation:
    """What to evaluate.

    Attributes:
        suite: its name, for the record.
        columns: which of it.
        output: where `results.json` and what the tasks write go.
        data: a folder with copies of the data sets by their hub paths; None reads the hub.
        limit: rows of each task, for a trial; a table marks what is not whole.
    """

    suite: str
    columns: Sequence[Column]
    output: Path
    data: Path | None = None
    limit: int | None = None
    seed: int = 1234


def evaluate(evaluation: Evaluation, model: lmms, name: str) -> dict[str, Any] | None:
    """Answer, score, and write `results.json`; returns what it holds, and None where another process writes it.

    Args:
        model: `aki.evaluation.lmms.Aki`, or any other chat model of lmms-eval.
        name: the row's name in a table.

    Raises:
        ValueError: no data for a task; the judge that is set does not answer.
    """
    judge = judge_model() if any(column.judged for column in evaluation.columns) else None
    # MME has two columns, of the same task.
    scored = {column.task: column for column in evaluation.columns if judge or not column.judged}
    tasks = {name: load_task(task_manager(), column, evaluation.data) for name, column in scored.items()}
    settings = dict(getattr(model, "settings", {"model_type": type(model).__name__}))
    found = _simple_evaluate(evaluation, model, list(tasks.values())) if tasks else {"results": {}, "samples": {}}
    if found is None:
        return None
    entries = {}
    for column in evaluation.columns:
        entries[column.name] = _entry(column, tasks.get(column.task), found, evaluation, settings)
    results = {
        "name": name,
        "suite": evaluation.suite,
        "scorer": "lmms-eval",
        "settings": settings
        | {"seed": evaluation.seed, "judge": judge, "limit": evaluation.limit}
        | {"versions": versions()},
        "columns": entries,
    }
    evaluation.output.mkdir(parents=True, exist_ok=True)
    write_json(evaluation.output / RESULTS, results)
    return results


@cache
def task_manager() -> TaskManager:
    """lmms-eval's index of the suites' tasks, ours among them."""
    return TaskManager("WARNING", [*TASK_FOLDERS, str(OWN_TASKS)], include_defaults=False, model_name="aki")


def judge_model() -> str | None:
    """The judge that lmms-eval's settings name, once it has answered; None where there are no such settings.

    Raises:
        ValueError: it does not answer, which lmms-eval would find out hours later, answer by answer.
    """
    provider = os.environ.get("API_TYPE", "openai")
    if provider == "openai" and not os.environ.get("OPENAI_API_KEY"):
        return None
    name = os.environ.get("MODEL_VERSION", "gpt-4o-2024-11-20")
    server = get_server(server_name=provider, config=ServerConfig(model_name=name, num_retries=1))
    if not server.is_available():
        return None
    try:
        server.evaluate(Request(messages=[{"role": "user", "content": "Say the number 1."}]))
    except Exception as error:
        raise ValueError(
            f"the judge {name} does not answer ({error}): mend OPENAI_API_KEY, OPENAI_API_URL or MODEL_VERSION, or "
            "unset the key to leave the judged columns empty."
        ) from error
    return name


def _simple_evaluate(evaluation: Evaluation, model: lmms, tasks: list[Any]) -> dict[str, Any] | None:
    evaluation.output.mkdir(parents=True, exist_ok=True)
    arguments = Namespace(output_path=str(evaluation.output), process_with_media=False, reasoning_tags=None)
    return simple_evaluate(
        model=model,
        tasks=tasks,
        task_manager=task_manager(),
        limit=evaluation.limit,
        bootstrap_iters=0,
        random_seed=evaluation.seed,
        numpy_random_seed=evaluation.seed,
        torch_random_seed=evaluation.seed,
        cli_args=arguments,
    )


def _entry(
    column: Column, task: Any, found: dict[str, Any], evaluation: Evaluation, settings: dict[str, Any]
) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "task": column.task,
        "metric": column.metric,
        "split": column.split,
        "best": column.best,
        "score": None,
        "note": "",
    }
    if task is None:
        return entry | {"note": NO_JUDGE}
    samples = sorted(found["samples"][column.task], key=lambda sample: sample["doc_id"])
    prompts = [sample["arguments"][0] for sample in samples]
    rows = task.test_docs()
    entry |= {
        "rows": len(samples),
        "of": len(rows),
        "prompt": {"first": prompts[0], "fingerprint": key_of(prompts)[:16]},
        "decoding": decoding_of(task.config.generation_kwargs, settings.get("limit_new_tokens")),
        "until": task.config.generation_kwargs.get("until"),
        "data": data_fingerprint(rows),
    }
    unjudged = sum(_judge_failed(column, sample) for sample in samples)
    if unjudged:
        note = f"the judge gave no score for {unjudged} of {len(samples)} answers; run again, the answers are kept"
        return entry | {"note": note}
    score = found["results"][column.task].get(f"{column.metric},none")
    # lmms-eval's MathVista says None where nothing was right; without samples of the metric there is no number.
    if score is None and any(column.metric in sample for sample in samples):
        score = 0.0
    return entry | {"score": None if score is None else float(score) * column.scale}


def _judge_failed(column: Column, sample: dict[str, Any]) -> bool:
    """Whether lmms-eval took a judge's silence for a wrong answer; each judged task writes that its own way."""
    if not column.judged:
        return False
    verdict = sample[column.metric]
    if "scores" in verdict:
        return min(verdict["scores"]) < 0
    if "eval_model" in verdict:
        return not verdict["eval_model"]
    return verdict["extraction"] == "" and bool(sample["filtered_resps"][0].strip())
