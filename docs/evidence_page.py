"""Writes the table and the picture of `docs/evidence.md` from the finished cells: `python docs/evidence_page.py`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from aki.data.scenes.questions import LOOKUPS, SUMS
from aki.evaluation.compare import Comparison, load_comparison
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
KINDS = ("things", "words", "crowded", "drawings")


def measured(recipe: Recipe, folder: Path) -> Comparison:
    """What is finished, with the measures of the plan among each run's `test` and `curve`: `sums`, `others`, and what
    the model scores on the sums when it is asked under another rule than its own (`asked`)."""
    comparison = load_comparison(recipe, folder, list(recipe.rows))
    comparison.results = {row: runs for row, runs in comparison.results.items() if runs}
    for runs in comparison.results.values():
        for run in runs:
            for scores in (run["test"], *run["curve"]):
                scores |= {"sums": mean_over(scores, SUMS), "others": mean_over(scores, LOOKUPS)}
            file = folder / "asked" / f"{run['cell']}.json"
            found = json.loads(file.read_text()) if file.exists() else {"under": {}, "nats": {}, "paid": []}
            run["asked"] = {rule: mean_over(scores, SUMS) for rule, scores in found["under"].items()}
            run["nats"] = {rule: mean_over(scores, SUMS) for rule, scores in found["nats"].items()}
            run["paid"] = found["paid"]
    return comparison


def mean_over(scores: dict[str, float], skills: Sequence[str]) -> float:
    """Of `same`: over SUMS it is the main measure, over LOOKUPS the other one."""
    return statistics.mean(scores[skill] for skill in skills if skill in scores)


def gains(comparison: Comparison, row: str, measure: str = "sums") -> list[float]:
    """Points over the causal row of its pair, for each seed that both have."""
    return paired(comparison.results, row, compared_with(comparison.recipe, row), measure)


def table(comparison: Comparison) -> str:
    """A row a row, in percent: the main measure and the others, each held-out kind, and the sums asked otherwise."""
    held_out = [f"{kind}: {part}" for kind in KINDS for part in ("sums", "others")]
    heads = ["row", "seeds", "sums", "to causal, points", "others", "to causal, points"]
    heads += [name.replace(":", ",") for name in held_out]
    heads += ["sums, asked causally", "asked under MMA", "steps to causal's last"]
    lines = ["| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * (len(heads) - 1)]
    titles = titles_of(comparison.recipe)
    for row, runs in comparison.results.items():
        cells = [titles[row], str(len(runs))]
        for name in ("sums", "others"):
            cells.append(with_interval([100 * run["test"][name] for run in runs]))
            cells.append(with_interval(gains(comparison, row, name), "+"))
        cells += [with_interval([100 * run["test"][name] for run in runs if name in run["test"]]) for name in held_out]
        cells += [
            with_interval([100 * run["asked"][rule] for run in runs if rule in run["asked"]])
            for rule in ("causal", "mma")
        ]
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
    points = gains(comparison, "mma") if "mma" in results else []
    if len(points) > 1:
        mean, half = interval(points)
        assert half is not None
        there += f" MMA - causal on the sums: {mean:+.1f} ± {half:.1f} points over {len(points)} seeds"
        there += ", which is narrow enough." if half <= WANTED else f"; ± {WANTED} is wanted."
    return there


def asked_table(comparison: Comparison) -> str:
    """Of rows that were asked so: the loss on the sums under their own rule, the sums with MMA in half of the layers,
    and attention by thirds of the layers."""
    lines = [
        "| row | loss on the sums, nats an answer | to causal "
        "| sums, MMA in the lower half alone | in the upper half alone "
        "| attention of pictures to the question, %: lower, middle, upper third of the layers |",
        "| --- |" + " ---: |" * 5,
    ]
    recipe, results, titles = comparison.recipe, comparison.results, titles_of(comparison.recipe)
    losses = {
        row: {run["seed"]: run["nats"][rule_of(recipe, row)] for run in runs if run["nats"]}
        for row, runs in results.items()
    }
    for row, runs in results.items():
        looked = [run for run in runs if run["nats"]]
        if not looked:
            continue
        base = losses.get(compared_with(recipe, row) or "", {})
        more = [loss - base[seed] for seed, loss in losses[row].items() if seed in base]
        nats = [with_interval(list(losses[row].values()), digits=3), with_interval(more, "+", 3)]
        halves = [
            with_interval([100 * run["asked"][f"mma, {half} half"] for run in looked]) for half in ("lower", "upper")
        ]
        paid = [statistics.mean(values) for values in zip(*(run["paid"] for run in looked if run["paid"]), strict=True)]
        third = max(1, len(paid) // 3)
        thirds = [paid[:third], paid[third:-third] or paid, paid[-third:]] if paid else []
        cells = [titles[row], *nats, *halves, ", ".join(f"{100 * statistics.mean(part):.1f}" for part in thirds)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) if len(lines) > 2 else ""


def rule_of(recipe: Recipe, row: str) -> str:
    return row_recipe(recipe, recipe.rows[row], seed=0).stage("sft").rule


def draw(comparison: Comparison, path: Path) -> None:
    """Both measures of each row, their differences to causal, and the learning curves: of the sums from
    the start that reads, of reading where it is learned."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results, titles = comparison.results, titles_of(comparison.recipe)
    figure, axes = plt.subplots(1, 4, figsize=(18, 1.6 + 0.4 * max(4, len(results))), layout="constrained")
    for place, (row, runs) in enumerate(results.items()):
        for measure, style, by in (("sums", {"fmt": "o"}, -0.15), ("others", {"fmt": "s", "mfc": "white"}, 0.15)):
            own = [100 * run["test"][measure] for run in runs]
            for axis, values in ((axes[0], own), (axes[1], gains(comparison, row, measure))):
                if values:
                    mean, half = interval(values)
                    axis.errorbar(mean, place + by, xerr=half, color=f"C{place}", capsize=3, **style)
        for axis, base, measure in ((axes[2], BASE, "sums"), (axes[3], "words-causal", "others")):
            curves = [[100 * point[measure] for point in run["curve"]] for run in runs if run["curve"]]
            if curves and base in (row, compared_with(comparison.recipe, row)):
                steps = [point["step"] for point in runs[0]["curve"]]
                means = [statistics.mean(values) for values in zip(*curves, strict=True)]
                axis.plot(steps, means, color=f"C{place}", label=titles[row])
    labels = ("● sums, □ others, %", "points to causal, same seeds", "SFT step", "SFT step")
    for axis, label in zip(axes, labels, strict=True):
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[1].axvline(0, color="gray", linewidth=1)
    for axis in axes[:2]:
        axis.set_yticks(range(len(results)), [titles[row] for row in results])
        axis.set_ylim(len(results) - 0.5, -0.5)
    axes[1].set_yticklabels([])
    for axis, measure in ((axes[2], "sums"), (axes[3], "reading")):
        axis.set_ylabel(f"{measure}, %, validation")
        if axis.lines:
            axis.legend(fontsize=8)
            axis.locator_params("x", nbins=6)
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
