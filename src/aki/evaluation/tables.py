"""Our results under a paper's rows: what is best, what improved on what, and what cannot be compared as it stands."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

OWN = "own questions"
"""The suite of results that no paper has."""
PAPERS = Path(__file__).with_name("papers.yaml")
PART, ASKED, DATA, METRIC, OTHER_SCORER = "*", "‡", "§", "¶", "†"
LEGEND = {
    PART: "not all rows of the split, or another split than the first of our rows in this column",
    ASKED: "asked in another way than the first of our rows in this column (prompt, or decoding)",
    DATA: "on other data than the first of our rows in this column",
    METRIC: "by another task or metric than the first of our rows in this column",
}
_PER_COLUMN = {
    "task": ("task", METRIC),
    "metric": ("metric", METRIC),
    "prompt": ("prompt", ASKED),
    "decoding": ("decoding", ASKED),
    "until": ("decoding", ASKED),
    "data": ("data", DATA),
    "split": ("split", PART),
}
"""Field of a column in results.json: what it is called, and the mark of rows that differ in it."""


@dataclass
class Row:
    """One model's scores.

    Attributes:
        scores: by column; None is a column that was not measured.
        marks: by column, what to know before comparing.
        rule: the attention rule, where it is known.
        record: all of `results.json`, where the row is ours.
    """

    name: str
    scorer: str
    scores: dict[str, float | None]
    marks: dict[str, str] = field(default_factory=dict)
    rule: str | None = None
    record: dict[str, Any] | None = None

    @property
    def ours(self) -> bool:
        return self.record is not None


@dataclass
class Table:
    """A table of a paper with our rows below.

    Attributes:
        best, second: (row, column) of the highest scores, among the rows of one scorer.
        improvements: label -> relative difference in percent by column.
        notes: what the marks mean, and what is missing and why.
    """

    title: str
    columns: list[str]
    rows: list[Row]
    best: set[tuple[int, str]]
    second: set[tuple[int, str]]
    improvements: dict[str, dict[str, float | None]]
    notes: list[str]


def read_results(path: Path) -> Row:
    """A row from `results.json` or the folder that holds it.

    Raises:
        ValueError: there are no results, or they are of something else.
    """
    file = path / "results.json" if path.is_dir() else path
    try:
        record = json.loads(file.read_text())
        scores = {
            name: None if entry["score"] is None else float(entry["score"]) for name, entry in record["columns"].items()
        }
        marks = {name: PART for name, entry in record["columns"].items() if entry.get("rows") != entry.get("of")}
        return Row(str(record["name"]), record["scorer"], scores, marks, record["settings"].get("rule"), record)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{file} holds no results of `aki eval` ({reason}).") from error


def read_own(path: Path) -> dict[str, Any] | None:
    """Results of questions of the user's own, None if there are none there."""
    file = path / "results.json" if path.is_dir() else path
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("suite") == OWN else None


def paper_tables(paper: str, ours: Sequence[Row]) -> list[Table]:
    """The paper's tables with our rows.

    Raises:
        ValueError: no such paper; two of our rows of one name, or one with other columns.
    """
    papers = yaml.safe_load(PAPERS.read_text())
    if paper not in papers:
        raise ValueError(f"there are no tables of {paper!r}; there are those of {', '.join(papers)}.")
    names = [row.name for row in ours]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two results are named {name}: give each its own with `aki eval --name`.")
    columns, scorer = papers[paper]["columns"], papers[paper]["scorer"]
    for row in ours:
        if not set(row.scores) & set(columns):
            raise ValueError(
                f"the results of {row.name} have no column of the tables of {paper}: run `aki eval` on it."
            )
    _mark_differences(ours, columns)
    tables = []
    for printed in papers[paper]["tables"]:
        rules = {name: rule for rule, name in printed.get("rules", {}).items()}
        theirs = [
            Row(f"{name}{OTHER_SCORER}", scorer, dict(zip(columns, scores, strict=True)), rule=rules.get(name))
            for name, scores in printed["rows"].items()
        ]
        improvements = _improvements(theirs, columns) | _improvements(ours, columns)
        tables.append(_table(f"{printed['name']}: {printed['title']}", columns, [*theirs, *ours], scorer, improvements))
    return tables


def differences(ours: Sequence[Row]) -> list[str]:
    """A sentence for each setting in which two of our rows differ, and that can change a score."""
    if not ours:
        return []
    found = []
    settings = [_flat(_record(row)["settings"]) for row in ours]
    for name in sorted(set().union(*settings) - {"checkpoint", "model_type"}):
        values = {row.name: known.get(name) for row, known in zip(ours, settings, strict=True)}
        if len({json.dumps(value, sort_keys=True) for value in values.values()}) > 1:
            found.append(f"{name} differs: " + ", ".join(f"{row} {value}" for row, value in values.items()))
    for column in dict.fromkeys(name for row in ours for name in row.scores):
        for key, (what, _) in _PER_COLUMN.items():
            known = _recorded(ours, column, key)
            if len({value for _, value in known}) > 1:
                found.append(f"{column}: {what} differs between {', '.join(row.name for row, _ in known)}")
    return list(dict.fromkeys(found))


def summary(results: dict[str, Any]) -> str:
    """One line a column, with the reason where a column is empty."""
    lines = ["| column | score | of | rows | |", "| --- | ---: | ---: | ---: | --- |"]
    for name, entry in results["columns"].items():
        score = "" if entry["score"] is None else f"{entry['score']:.1f}"
        rows = f"{entry['rows']} of {entry['of']}" if "rows" in entry else ""
        lines.append(f"| {name} | {score} | {entry['best']:.0f} | {rows} | {entry['note']} |")
    return "\n".join(lines)


def _record(row: Row) -> dict[str, Any]:
    assert row.record is not None
    return row.record


def _recorded(ours: Sequence[Row], column: str, key: str) -> list[tuple[Row, str]]:
    """The rows that say something of a column, with what they say."""
    entries = [(row, _record(row)["columns"].get(column, {})) for row in ours]
    return [(row, _identity(entry[key])) for row, entry in entries if key in entry]


def _mark_differences(ours: Sequence[Row], columns: Sequence[str]) -> None:
    for column in columns:
        for key, (_, mark) in _PER_COLUMN.items():
            known = _recorded(ours, column, key)
            for row, value in known[1:]:
                if value != known[0][1] and mark not in row.marks.get(column, ""):
                    row.marks[column] = row.marks.get(column, "") + mark


def _table(
    title: str, columns: list[str], rows: list[Row], scorer: str, improvements: dict[str, dict[str, float | None]]
) -> Table:
    best, second = set(), set()
    for column in columns:
        for of in dict.fromkeys(row.scorer for row in rows):
            scores = [(row.scores.get(column), i) for i, row in enumerate(rows) if row.scorer == of]
            ranked = sorted({score for score, _ in scores if score is not None}, reverse=True)
            if len(ranked) > 1:
                best |= {(i, column) for score, i in scores if score == ranked[0]}
                second |= {(i, column) for score, i in scores if score == ranked[1]}
    notes = [
        f"{OTHER_SCORER} as printed; another scorer ({scorer}): the best and second are marked among its own rows."
    ]
    used = "".join(mark for row in rows for mark in row.marks.values())
    notes += [f"{mark} {meaning}." for mark, meaning in LEGEND.items() if mark in used]
    for row in rows:
        missing = [column for column in columns if row.scores.get(column) is None]
        if missing:
            reasons = dict.fromkeys(_reason(row, column) for column in missing)
            notes.append(f"{row.name} has no {', '.join(missing)}: {'; '.join(reasons)}.")
    return Table(title, columns, rows, best, second, improvements, notes)


def _reason(row: Row, column: str) -> str:
    entry = (row.record or {}).get("columns", {}).get(column)
    return "not evaluated" if entry is None else entry.get("note") or "no score"


def _improvements(rows: Sequence[Row], columns: list[str]) -> dict[str, dict[str, float | None]]:
    """(row - base) / base in percent: of every rule over causal, and of mma over concentric (CCA) too.

    The base is the first row of that rule with a model of the same type.
    """
    others = [row for row in rows if row.rule not in (None, "causal")]
    pairs = [(row, "causal") for row in others] + [(row, "concentric") for row in others if row.rule == "mma"]
    found: dict[str, dict[str, float | None]] = {}
    for row, rule in pairs:
        base = next((base for base in rows if base.rule == rule and _model_type(base) == _model_type(row)), None)
        if base is None:
            continue
        values: dict[str, float | None] = {}
        for column in columns:
            score, start = row.scores.get(column), base.scores.get(column)
            values[column] = (score - start) / start * 100 if score is not None and start else None
        found[f"{row.name} over {base.name}, %"] = values
    return found


def _model_type(row: Row) -> str | None:
    return row.record["settings"].get("model_type") if row.record else None


def _identity(value: Any) -> str:
    if isinstance(value, dict) and "fingerprint" in value:
        return value["fingerprint"]
    return json.dumps(value, sort_keys=True)


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{inner}": known for inner, known in value.items()}
        else:
            flat[name] = value
    return flat
