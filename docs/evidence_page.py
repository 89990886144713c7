"""Writes the table and the picture of `docs/evidence.md` from the finished cells: `python docs/evidence_page.py`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from aki.data.scenes.questions import LOOKUPS, SUMS
from aki.evaluation.compare import Comparison, Run, load_comparison
from aki.evaluation.plan import BASE, compared_with, row_recipe
from aki.evaluation.report import interval, paired, steps_to_reach, titles_of, with_interval
from aki.training.recipe import Recipe, load_recipe

ROOT = Path(__file__).parents[1]
PAGE, PICTURE = ROOT / "docs" / "evidence.md", ROOT / "docs" / "evidence.png"
FOLDER = ROOT / "results" / "scenes"
BEGIN, END = "<!-- results: made by docs/evidence_page.py -->", "<!-- end of results -->"
SEEDS = {
    "causal": 3,
    "mma": 3,
    "captions-causal": 1,
    "captions-mma": 1,
    "words-causal": 6,
    "words-mma": 6,
    "words-echo": 2,
    "words-dot": 1,
    "words-prefix": 1,
    "words-image-bidirectional": 1,
    "words-mma-image-bidirectional": 1,
    "words-concentric": 1,
    "words-blind": 1,
}
"""Row -> how many seeds the plan gives it."""
WANTED = 1.5
"""Points: half the width of the interval at which there are seeds enough."""
MEASURES = {"sums": SUMS, "others": LOOKUPS}
"""The main one first."""
PAIRS = (("mma", "sums"), ("words-mma", "sums"), ("words-mma", "others"))
"""The differences for which seeds are run."""
NEAREST = -20
"""Points to causal; what is further behind (without the picture) is left to the table."""
KINDS = ("things", "words", "crowded", "drawings")


def measured(recipe: Recipe, folder: Path) -> Comparison:
    """What is finished, with the measures of the plan among each run's `test` and `curve`; and what the model says when
    it is asked otherwise than it was trained: rule -> measure -> accuracy (`under`), measure -> its loss under its own
    rule (`nats`), measure -> accuracy without the pictures (`blind`), and the attention that pictures pay to the
    question (`paid`)."""
    comparison = load_comparison(recipe, folder, list(recipe.rows))
    comparison.results = {row: runs for row, runs in comparison.results.items() if runs}
    for row, runs in comparison.results.items():
        rule = rule_of(recipe, row)
        for run in runs:
            for scores in (run["test"], *run["curve"]):
                scores |= by_measure(scores)
            file = folder / "asked" / f"{run['cell']}.json"
            found = json.loads(file.read_text()) if file.exists() else {"under": {}, "nats": {}, "paid": []}
            run["under"] = {rule: by_measure(scores) for rule, scores in found["under"].items()}
            run["nats"] = by_measure(found["nats"].get(rule, {}))
            run["paid"] = found["paid"]
            run["blind"] = by_measure(run["baselines"]["blind"])
    return comparison


def by_measure(scores: dict[str, float]) -> dict[str, float]:
    """Measure -> the mean of its skills (of `same`), where any was asked."""
    return {
        measure: statistics.mean(scores[skill] for skill in skills if skill in scores)
        for measure, skills in MEASURES.items()
        if scores.keys() & set(skills)
    }


def gains(comparison: Comparison, row: str, measure: str) -> list[float]:
    """Points over the causal row of its pair, for each seed that both have."""
    return paired(comparison.results, row, compared_with(comparison.recipe, row), measure)


def table(comparison: Comparison) -> str:
    """A row a row, in percent: the main measure and the others, and each held-out kind."""
    held_out = [f"{kind}: {part}" for kind in KINDS for part in MEASURES]
    heads = ["row", "seeds"]
    for measure in MEASURES:
        heads += [measure, "to causal, points", "without the picture"]
    heads += [name.replace(":", ",") for name in held_out]
    heads.append("steps to causal's last")
    lines = ["| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * (len(heads) - 1)]
    titles = titles_of(comparison.recipe)
    for row, runs in comparison.results.items():
        cells = [titles[row], str(len(runs))]
        for name in MEASURES:
            cells.append(with_interval([100 * run["test"][name] for run in runs]))
            cells.append(with_interval(gains(comparison, row, name), "+"))
            cells.append(with_interval([100 * run["blind"][name] for run in runs]))
        cells += [with_interval([100 * run["test"][name] for run in runs if name in run["test"]]) for name in held_out]
        cells.append(reached(comparison, row))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def reached(comparison: Comparison, row: str) -> str:
    results, other = comparison.results, compared_with(comparison.recipe, row)
    if other not in results or not all(run["curve"] for run in [*results[row], *results[other]]):
        return ""
    step, last = steps_to_reach(results, row, other)
    return str(step) if step else f"more than {last}"


def what_is_there(comparison: Comparison) -> str:
    """How far the runs are, by the plan."""
    results = comparison.results
    missing = {row: seeds - len(results.get(row, [])) for row, seeds in SEEDS.items()}
    there = f"**Finished: {sum(map(len, results.values()))} cells.** "
    left = ", ".join(f"{row} {number}" for row, number in missing.items() if number > 0)
    there += f"Still to run, seeds: {left}." if left else "All that the plan names."
    return " ".join(filter(None, (there, *(pairs_of(comparison, *pair) for pair in PAIRS))))


def pairs_of(comparison: Comparison, row: str, measure: str) -> str:
    """The difference to causal, and that of each seed; empty where there are fewer than two."""
    points = gains(comparison, row, measure) if row in comparison.results else []
    if len(points) < 2:
        return ""
    mean, half = interval(points)
    assert half is not None
    enough = "which is narrow enough" if half <= WANTED else f"± {WANTED} is wanted"
    title = titles_of(comparison.recipe)[row]
    each = ", ".join(f"{point:+.1f}" for point in points)
    return f"{title}, {measure}: {mean:+.1f} ± {half:.1f} points to causal over {len(points)} seeds ({each}), {enough}."


ASKED = {
    "asked causally": "causal",
    "under MMA": "mma",
    "with MMA in the lower half alone": "mma, lower half",
    "in the upper half alone": "mma, upper half",
}
"""Head of a column -> what `benchmarks/scenes_asked.py` calls it."""


def asked_table(comparison: Comparison) -> str:
    """Of rows that were asked so, a line a measure: accuracy under other rules than their own and with MMA in half of
    the layers, the loss under their own, and attention by thirds of the layers."""
    heads = ["row", "of", "seeds", *ASKED, "nats an answer", "to causal", "attention, %, by thirds of the layers"]
    lines = ["| " + " | ".join(heads) + " |", "| --- | --- |" + " ---: |" * (len(heads) - 2)]
    results, titles = comparison.results, titles_of(comparison.recipe)
    for row, runs in results.items():
        rivals = {run["seed"]: run for run in results.get(compared_with(comparison.recipe, row) or "", [])}
        for measure in MEASURES:
            looked = [run for run in runs if measure in run["nats"]]
            if not looked:
                continue
            cells = [titles[row], measure, str(len(looked))]
            cells += [with_interval([100 * run["under"][rule][measure] for run in looked]) for rule in ASKED.values()]
            pairs = [(run["nats"], rivals[run["seed"]]["nats"]) for run in looked if run["seed"] in rivals]
            more = [own[measure] - other[measure] for own, other in pairs if measure in other]
            cells += [with_interval([run["nats"][measure] for run in looked], digits=3), with_interval(more, "+", 3)]
            lines.append("| " + " | ".join([*cells, thirds(looked)]) + " |")
    return "\n".join(lines) if len(lines) > 2 else ""


def thirds(runs: Sequence[Run]) -> str:
    """The share of attention that pictures pay to the question in the lower, middle and upper layers, in percent."""
    paid = [statistics.mean(values) for values in zip(*(run["paid"] for run in runs if run["paid"]), strict=True)]
    third = max(1, len(paid) // 3)
    parts = [paid[:third], paid[third:-third] or paid, paid[-third:]] if paid else []
    return ", ".join(f"{100 * statistics.mean(part):.1f}" for part in parts)


def rule_of(recipe: Recipe, row: str) -> str:
    return row_recipe(recipe, recipe.rows[row], seed=0).stage("sft").rule


def draw(comparison: Comparison, path: Path) -> None:
    """Both measures of each row, their differences to causal, and the learning curves: of the sums from
    the start that reads, of reading where it is learned."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results, titles = comparison.results, titles_of(comparison.recipe)
    colors = plt.get_cmap("turbo", len(results))
    figure, axes = plt.subplots(1, 4, figsize=(20, 1.6 + 0.4 * max(4, len(results))), layout="constrained")
    for place, (row, runs) in enumerate(results.items()):
        styles = ({"fmt": "o"}, -0.15), ({"fmt": "s", "mfc": "white"}, 0.15)
        for measure, (style, by) in zip(MEASURES, styles, strict=True):
            own = [100 * run["test"][measure] for run in runs]
            for axis, values in ((axes[0], own), (axes[1], gains(comparison, row, measure))):
                if values:
                    mean, half = interval(values)
                    if len(values) < 3:
                        half = None  # Two seeds' is wider than the picture.
                    axis.errorbar(mean, place + by, xerr=half, color=colors(place), capsize=3, **style)
        for axis, base, measure in ((axes[2], BASE, "sums"), (axes[3], "words-causal", "others")):
            curves = [[100 * point[measure] for point in run["curve"]] for run in runs if run["curve"]]
            if curves and base in (row, compared_with(comparison.recipe, row)):
                steps = [point["step"] for point in runs[0]["curve"]]
                means = [statistics.mean(values) for values in zip(*curves, strict=True)]
                axis.plot(steps, means, color=colors(place), label=titles[row])
    labels = ("● sums, □ others, %", "points to causal, same seeds", "SFT step", "SFT step")
    for axis, label in zip(axes, labels, strict=True):
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
        axis.locator_params("x", nbins=6)
    axes[1].set_xlim(left=max(NEAREST, axes[1].get_xlim()[0]))
    axes[1].axvline(0, color="gray", linewidth=1)
    for axis in axes[:2]:
        axis.set_yticks(range(len(results)), [titles[row] for row in results])
        axis.set_ylim(len(results) - 0.5, -0.5)
    axes[1].set_yticklabels([])
    for axis, measure in ((axes[2], "sums"), (axes[3], "reading")):
        axis.set_ylabel(f"{measure}, %, validation")
        if axis.lines:
            axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.02, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def made(comparison: Comparison, picture: str = "evidence.png") -> str:
    """What stands between the marks of the page."""
    if not comparison.results:
        return what_is_there(comparison)
    parts = [
        what_is_there(comparison),
        "Percent, mean over seeds ± 95 % interval (t).",
        table(comparison),
        asked_table(comparison),
        f"![Sums and other questions by row, differences to causal, learning curves]({picture})",
    ]
    return "\n\n".join(part for part in parts if part)


def write(page: Path, text: str) -> None:
    before, rest = page.read_text().split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")


def main() -> None:
    comparison = measured(load_recipe("scenes"), FOLDER)
    if comparison.results:
        draw(comparison, PICTURE)
    write(PAGE, made(comparison))


if __name__ == "__main__":
    main()
