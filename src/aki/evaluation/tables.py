"""Our results under a paper's rows: what is best, what improved on what, and what cannot be compared as it stands."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

PAPERS = Path(__file__).with_name("papers.yaml")
PART, ASKED, DATA, OTHER_SCORER = "*", "‡", "§", "†"
LEGEND = {
    PART: "not all rows of the split, or another split",
    ASKED: "asked in another way than the first of our rows (prompt, or decoding)",
    DATA: "on other data than the first of our rows",
}
_PER_COLUMN = {"prompt": "prompt", "decoding": "decoding", "until": "decoding", "data": "data", "split": "split"}


@dataclass
class Row:
    """One model's scores.

    Attributes:
        scores: by column; None is a column that was not measured.
        marks: by column, what to know before comparing.
        rule: the attention rule, where the row is ours.
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
        columns, settings = record["columns"], record["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} holds no results of `aki eval` ({type(error).__name__}).") from error
    scores = {name: entry["score"] for name, entry in columns.items()}
    marks = {name: PART for name, entry in columns.items() if entry.get("rows") != entry.get("of")}
    return Row(record["name"], record["scorer"], scores, marks, settings.get("rule"), record)


def paper_tables(paper: str, ours: Sequence[Row]) -> list[Table]:
    """The paper's tables with our rows.

    Raises:
        ValueError: no such paper; two of our rows of one name, or one with other columns.
    """
    papers = yaml.safe_load(PAPERS.read_text())
    if paper not in papers:
        raise ValueError(f"there are no tables of {paper!r}; there are those of {', '.join(papers)}.")
    names = [row.name for row in ours]
    if len(set(names)) < len(names):
        raise ValueError("two results have one name: give each its own with `aki eval --name`.")
    columns, scorer = papers[paper]["columns"], papers[paper]["scorer"]
    for row in ours:
        if not set(row.scores) & set(columns):
            raise ValueError(
                f"the results of {row.name} have no column of the tables of {paper}: run `aki eval` on it."
            )
    _mark_differences(ours)
    tables = []
    for printed in papers[paper]["tables"]:
        theirs = [
            Row(f"{name}{OTHER_SCORER}", scorer, dict(zip(columns, scores, strict=True)))
            for name, scores in printed["rows"].items()
        ]
        improvements = _improvements(_named(theirs, printed), columns) | _improvements(_by_rule(ours), columns)
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
        for key, what in _PER_COLUMN.items():
            entries = {row.name: _record(row)["columns"].get(column) for row in ours}
            values = {row: _identity(entry[key]) for row, entry in entries.items() if entry and key in entry}
            if len(set(values.values())) > 1:
                found.append(f"{column}: {what} differs between {', '.join(values)}")
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


def _mark_differences(ours: Sequence[Row]) -> None:
    for row in ours[1:]:
        for column, entry in _record(row)["columns"].items():
            first = _record(ours[0])["columns"].get(column)
            if not first:
                continue
            marks = row.marks.get(column, "")
            for key, mark in (
                ("split", PART),
                ("prompt", ASKED),
                ("decoding", ASKED),
                ("until", ASKED),
                ("data", DATA),
            ):
                both = key in entry and key in first
                if both and _identity(entry[key]) != _identity(first[key]) and mark not in marks:
                    marks += mark
            row.marks[column] = marks


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
    return "not evaluated" if entry is None else entry["note"] or "no score"


def _named(rows: list[Row], printed: dict[str, Any]) -> dict[str, Row]:
    """The paper's rows that improvements are counted from, and the one that is counted."""
    by_name = {row.name.removesuffix(OTHER_SCORER): row for row in rows}
    return {rule: by_name[printed[rule]] for rule in ("causal", "concentric", "mma") if rule in printed}


def _by_rule(rows: Iterable[Row]) -> dict[str, Row]:
    """The first of our rows of each rule."""
    found: dict[str, Row] = {}
    for row in rows:
        found.setdefault(row.rule or "", row)
    return found


def _improvements(rows: dict[str, Row], columns: list[str]) -> dict[str, dict[str, float | None]]:
    """(row - base) / base in percent of every rule over causal, and of mma over concentric (CCA) too."""
    pairs = [(row, rows["causal"]) for rule, row in rows.items() if rule != "causal" and "causal" in rows]
    if "mma" in rows and "concentric" in rows:
        pairs.append((rows["mma"], rows["concentric"]))
    found: dict[str, dict[str, float | None]] = {}
    for row, base in pairs:
        values: dict[str, float | None] = {}
        for column in columns:
            score, start = row.scores.get(column), base.scores.get(column)
            values[column] = (score - start) / start * 100 if score is not None and start else None
        found[f"{row.name} over {base.name}, %"] = values
    return found


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
