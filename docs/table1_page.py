"""Writes the tables and pictures of `docs/table1-digits.md` from the finished cells: `python docs/table1_page.py`."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path

from aki.commands.shared import read_recipe
from aki.data.digits import SKILLS
from aki.evaluation.compare import Comparison, load_comparison
from aki.evaluation.report import report_parts, summary_table, table, write_report

ROOT = Path(__file__).parents[1]
PAGE, DEPTH_PICTURE = ROOT / "docs" / "table1-digits.md", ROOT / "docs" / "digits-depth.png"
BEGIN, END = "<!-- {}: made by docs/table1_page.py -->", "<!-- end of {} -->"
DEPTHS = (1, 2, 4, 8)
RULES = ("causal", "mma")


@dataclass(frozen=True)
class Made:
    """How a folder of results was made: the recipe, what the command changed of it, and the rows; all if empty."""

    recipe: str
    changes: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()


RESULTS = {
    "table1-digits": Made("digits-table1"),
    "depth-digits": Made("digits-depth"),
    "rings-digits": Made(
        "digits-table1", ("--model.vision.patch_size", "4", "--learning-rates"), ("causal", "concentric", "mma")
    ),
}


def comparison(name: str) -> Comparison:
    made = RESULTS[name]
    recipe = read_recipe(Path(made.recipe), list(made.changes))
    return load_comparison(recipe, ROOT / "results" / name, made.rows or list(recipe.rows))


def rings_tables(rings: Comparison) -> str:
    return summary_table(rings) + "\n\n" + table(rings)


def accuracy(depth: Comparison, rule: str, layers: int, skill: str) -> list[float]:
    """In percent, one a seed."""
    return [100 * run["test"][skill] for run in depth.results[f"{rule}-{layers}"]]


def depth_table(depth: Comparison) -> str:
    """What MMA gains over causal, by skill and number of layers, mean over seeds; and both rules' accuracies."""
    columns = ("accuracy", *SKILLS)
    lines = [
        "| layers | seeds | "
        + " | ".join("all" if name == "accuracy" else name.replace("_", " ") for name in columns)
        + " |",
        "| --- |" + " ---: |" * (1 + len(columns)),
    ]
    for layers in DEPTHS:
        cells = []
        for name in columns:
            causal, mma = (statistics.mean(accuracy(depth, rule, layers, name)) for rule in RULES)
            cells.append(f"{causal:.1f} → {mma:.1f} ({mma - causal:+.1f})")
        seeds = len(accuracy(depth, "mma", layers, "accuracy"))
        lines.append(f"| {layers} | {seeds} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw_depth(depth: Comparison, path: Path) -> None:
    """Accuracy against decoder depth, a panel a skill: the mean, and a dot a seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = ("accuracy", *SKILLS)
    figure, axes = plt.subplots(1, len(columns), figsize=(15, 2.9), sharey=True, layout="constrained")
    for axis, name in zip(axes, columns, strict=True):
        for rule, colour in zip(RULES, ("tab:gray", "tab:blue"), strict=True):
            values = [accuracy(depth, rule, layers, name) for layers in DEPTHS]
            axis.plot(range(len(DEPTHS)), [statistics.mean(v) for v in values], color=colour, label=rule)
            for place, seeds in enumerate(values):
                axis.plot([place] * len(seeds), seeds, ".", color=colour, alpha=0.6)
        axis.set_title("all" if name == "accuracy" else name.replace("_", " "))
        axis.set_xticks(range(len(DEPTHS)), DEPTHS)
        axis.set_xlabel("layers")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("held-out accuracy, %")
    axes[0].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def made() -> dict[str, str]:
    """The parts of the page that come from the cells."""
    return {
        "report": "\n\n".join(report_parts(comparison("table1-digits"))),
        "depth": depth_table(comparison("depth-digits")),
        "rings": rings_tables(comparison("rings-digits")),
    }


def main() -> None:
    for name in RESULTS:
        write_report(comparison(name), ROOT / "results" / name)
    draw_depth(comparison("depth-digits"), DEPTH_PICTURE)
    page = PAGE.read_text()
    for name, text in made().items():
        begin, end = BEGIN.format(name), END.format(name)
        before, rest = page.split(begin)
        page = f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}"
    PAGE.write_text(page)


if __name__ == "__main__":
    main()
