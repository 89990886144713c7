"""Tables as Markdown, LaTeX and CSV, and their picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from aki.evaluation.tables import Row, Table

EMPTY = "-"
_MARKDOWN = str.maketrans({mark: "\\" + mark for mark in "|*_`<\\"})
_LATEX = str.maketrans(
    {mark: "\\" + mark for mark in "&%$#_{}"}
    | {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}"}
    | {"|": r"\textbar{}", "<": r"\textless{}", ">": r"\textgreater{}"}
    | {"†": r"$^\dagger$", "‡": r"$^\ddagger$", "§": r"$^\S$", "¶": r"$^\P$", "*": "$^*$"}
)


def markdown(table: Table) -> str:
    """Best in bold, second underlined."""
    lines = [
        [_marked(cell.translate(_MARKDOWN), "**", "**", "<u>", "</u>") for cell in cells] for cells in _lines(table)
    ]
    ruler = ["---"] + ["---:"] * len(table.columns)
    body = "\n".join("| " + " | ".join(cells) + " |" for cells in [lines[0], ruler, *lines[1:]])
    notes = "\\\n".join(note.translate(_MARKDOWN) for note in table.notes)
    return f"**{table.title}**\n\n{body}\n\n{notes}\n"


def latex(table: Table) -> str:
    """A tabular for the package booktabs, and the notes below it."""
    lines = [
        [_marked(cell.translate(_LATEX), r"\textbf{", "}", r"\underline{", "}") for cell in cells]
        for cells in _lines(table)
    ]
    header, *rows = [" & ".join(cells) + r" \\" for cells in lines]
    form = "l" + "r" * len(table.columns)
    body = [rf"\begin{{tabular}}{{{form}}}", r"\toprule", header, r"\midrule", *rows, r"\bottomrule", r"\end{tabular}"]
    notes = [rf"\par {{\footnotesize {note.translate(_LATEX)}}}" for note in table.notes]
    return "\n".join([f"% {table.title}", *body, *notes]) + "\n"


def as_csv(table: Table) -> str:
    """Numbers alone, the scorer and the marks in columns of their own."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["row", "scorer", *table.columns, "marks"])
    for row in table.rows:
        marks = "; ".join(f"{column} {mark}" for column, mark in row.marks.items() if mark)
        writer.writerow([row.name, row.scorer, *(_plain(row.scores.get(c)) for c in table.columns), marks])
    for label, values in table.improvements.items():
        writer.writerow([label, "", *(_plain(values[c]) for c in table.columns), ""])
    return out.getvalue()


def radar(rows: Sequence[Row], columns: Sequence[str], path: Path) -> None:
    """A radar, each axis from 0 to the highest of the rows; a line has a gap where its row has no score."""
    scores = {row.name: [row.scores.get(column) for column in columns] for row in rows}
    tops = [max((score for score in column if score), default=1.0) for column in zip(*scores.values(), strict=True)]
    angles = (np.pi / 2 - np.linspace(0, 2 * np.pi, len(columns), endpoint=False)) % (2 * np.pi)
    figure, axes = plt.subplots(figsize=(6.4, 5.6), subplot_kw={"projection": "polar"})
    for row in rows:
        shares = [np.nan if score is None else score / top for score, top in zip(scores[row.name], tops, strict=True)]
        style, label = "o-" if row.ours else "--", row.name.replace("$", r"\$")
        axes.plot([*angles, *angles[:1]], [*shares, *shares[:1]], style, label=label, linewidth=1.6, markersize=3)
    labels = [f"{column}\n{top:.1f}" for column, top in zip(columns, tops, strict=True)]
    axes.set_xticks(angles, labels, fontsize=8)
    axes.tick_params(axis="x", pad=20)
    axes.set_ylim(0, 1.05)
    axes.set_yticks([0.25, 0.5, 0.75, 1.0], [])
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3, fontsize=8, frameon=False)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)


FORMATS: dict[str, Callable[[Table], str]] = {"md": markdown, "tex": latex, "csv": as_csv}


_BEST, _SECOND, _END = "\0", "\1", "\2"
"""Around what is best and second, until a format writes it its way."""


def _lines(table: Table) -> list[list[str]]:
    lines = [["", *table.columns]]
    for i, row in enumerate(table.rows):
        cells = []
        for column in table.columns:
            score = row.scores.get(column)
            text = EMPTY if score is None else f"{score:.1f}"
            if (i, column) in table.best:
                text = f"{_BEST}{text}{_END}"
            elif (i, column) in table.second:
                text = f"{_SECOND}{text}{_END}"
            cells.append(text if score is None else text + row.marks.get(column, ""))
        lines.append([row.name, *cells])
    for label, values in table.improvements.items():
        known = [values[column] for column in table.columns]
        lines.append([label, *(EMPTY if value is None else f"{value:+.1f}" for value in known)])
    return lines


def _marked(text: str, best: str, best_end: str, second: str, second_end: str) -> str:
    end = best_end if _BEST in text else second_end
    return text.replace(_BEST, best).replace(_SECOND, second).replace(_END, end)


def _plain(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}" if abs(value) < 1000 else f"{value:.1f}"
