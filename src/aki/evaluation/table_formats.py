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
_LATEX = {"&": r"\&", "%": r"\%", "†": r"$^\dagger$", "‡": r"$^\ddagger$", "§": r"$^\S$", "_": r"\_"}


def markdown(table: Table) -> str:
    """Best in bold, second underlined."""
    lines = _lines(table, "**{}**", "<u>{}</u>")
    ruler = ["---"] + ["---:"] * len(table.columns)
    body = "\n".join("| " + " | ".join(cells) + " |" for cells in [lines[0], ruler, *lines[1:]])
    return f"**{table.title}**\n\n{body}\n\n" + "\n".join(f"{note}\\" for note in table.notes).rstrip("\\") + "\n"


def latex(table: Table) -> str:
    """A tabular for the package booktabs."""
    lines = [[_escaped(cell) for cell in cells] for cells in _lines(table, "\0b{}\1", "\0u{}\1")]
    header, *body = [" & ".join(cells).replace("\0b", r"\textbf{").replace("\0u", r"\underline{") for cells in lines]
    rows = " \\\\\n".join(row.replace("\1", "}") for row in body)
    notes = "\n".join(f"% {note}" for note in table.notes)
    form = "l" + "r" * len(table.columns)
    return (
        f"% {table.title}\n{notes}\n\\begin{{tabular}}{{{form}}}\n\\toprule\n{header} \\\\\n\\midrule\n{rows} \\\\\n"
        "\\bottomrule\n\\end{tabular}\n"
    )


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
    """A radar of the columns that every row has, each axis from 0 to the highest of the rows."""
    shared = [column for column in columns if all(row.scores.get(column) is not None for row in rows)]
    angles = (np.pi / 2 - np.linspace(0, 2 * np.pi, len(shared), endpoint=False)) % (2 * np.pi)
    top = {column: max(row.scores[column] or 0 for row in rows) or 1 for column in shared}
    figure, axes = plt.subplots(figsize=(6.4, 5.6), subplot_kw={"projection": "polar"})
    for row in rows:
        shares = [(row.scores[column] or 0) / top[column] for column in shared]
        style = "-" if row.ours else "--"
        axes.plot([*angles, *angles[:1]], [*shares, *shares[:1]], style, label=row.name, linewidth=1.6)
    labels = [f"{column}\n{top[column]:.1f}" for column in shared]
    axes.set_xticks(angles, labels, fontsize=8)
    axes.tick_params(axis="x", pad=14)
    axes.set_ylim(0, 1.05)
    axes.set_yticks([0.25, 0.5, 0.75, 1.0], [])
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=3, fontsize=8, frameon=False)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)


FORMATS: dict[str, Callable[[Table], str]] = {"md": markdown, "tex": latex, "csv": as_csv}


def _lines(table: Table, best: str, second: str) -> list[list[str]]:
    lines = [["", *table.columns]]
    for i, row in enumerate(table.rows):
        cells = []
        for column in table.columns:
            score = row.scores.get(column)
            text = EMPTY if score is None else f"{score:.1f}"
            if (i, column) in table.best:
                text = best.format(text)
            elif (i, column) in table.second:
                text = second.format(text)
            cells.append(text if score is None else text + row.marks.get(column, "").replace("*", r"\*"))
        lines.append([row.name, *cells])
    for label, values in table.improvements.items():
        known = [values[column] for column in table.columns]
        lines.append([label, *(EMPTY if value is None else f"{value:+.1f}" for value in known)])
    return lines


def _escaped(text: str) -> str:
    text = text.replace(r"\*", "*")
    for found, written in _LATEX.items():
        text = text.replace(found, written)
    return text


def _plain(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}" if abs(value) < 1000 else f"{value:.1f}"
