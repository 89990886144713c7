"""What a comparison says: a table, a picture, and three questions answered."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from scipy.stats import t

from aki.data.digits import SEARCHING_SKILLS
from aki.evaluation.compare import Comparison
from aki.evaluation.plan import BASE, compared_with, row_recipe
from aki.models import AkiForConditionalGeneration, AkiProcessor
from aki.training.held_out import scenes
from aki.training.recipe import Recipe

Results = dict[str, list[dict[str, Any]]]
"""Row -> what was measured, one a seed."""

COLOURS = ("gray", "blue", "orange", "green", "red", "purple", "brown", "pink", "olive", "cyan")
_EQUAL_COMPUTE = 0.02


def table(comparison: Comparison) -> str:
    """Held-out accuracy in percent as Markdown: a row a rule (mean over seeds), then the difference to its rival."""
    results = comparison.results
    columns = ["accuracy", *skills_of(results)]
    lines = [
        "| rule | " + " | ".join("all" if name == "accuracy" else name.replace("_", " ") for name in columns) + " |",
        "| --- |" + " ---: |" * len(columns),
    ]
    for rule, runs in results.items():
        lines.append(f"| {rule} | " + " | ".join(f"{_mean(runs, name):.1f}" for name in columns) + " |")
    for rule in results:
        base = compared_with(comparison.recipe, rule)
        if base and paired(results, rule, base):
            gains = [statistics.mean(paired(results, rule, base, name)) for name in columns]
            lines.append(f"| {rule} - {base} | " + " | ".join(f"{gain:+.1f}" for gain in gains) + " |")
    return "\n".join(lines)


def skills_of(results: Results) -> list[str]:
    """What every run was measured on, in the order of the first; and `searching`, where the digits' skills are."""
    runs = [run["test"] for of_row in results.values() for run in of_row]
    skills = [name for name in runs[0] if name != "accuracy" and all(name in run for run in runs)]
    return [*skills, "searching"] if set(SEARCHING_SKILLS) <= set(skills) else skills


def write_report(comparison: Comparison, folder: Path) -> str:
    """Write `report.md`, `report.png`, and `curves.png` where there are learning curves; returns the report's text."""
    report = "\n\n".join(report_parts(comparison)) + "\n"
    (folder / "report.md").write_text(report)
    draw_report(comparison, folder / "report.png")
    if _has_curves(comparison.results):
        draw_curves(comparison.results, folder / "curves.png")
    return report


def report_parts(comparison: Comparison) -> list[str]:
    """The paragraphs and tables of a report."""
    results = comparison.results
    bases = {row: compared_with(comparison.recipe, row) for row in results}
    own = {row: base for row, base in bases.items() if base in results and base != BASE}
    parts = [
        "Held-out accuracy in percent: mean over seeds ± 95 % interval (t), and the difference to causal on the same "
        "seeds" + "".join(f"; of {row} to {base}" for row, base in own.items()) + ".",
        summary_table(comparison),
        *remarks(comparison),
        "By skill (mean over seeds"
        + (f"; searching is the mean of {_words(SEARCHING_SKILLS)}" if "searching" in skills_of(results) else "")
        + "):",
        table(comparison),
    ]
    if max(map(len, results.values())) > 1:
        parts += ["Every seed:", seeds_table(results)]
    if comparison.searched:
        parts += ["SFT's learning rates, tried on a seed of their own (accuracy on the validation questions):"]
        parts += [rates_table(comparison.searched)]
    for row, base in bases.items():
        if _has_curves(results) and base in results:
            step, last = steps_to_reach(results, row, base)
            reached = f"at step {step} of {last}" if step else f"later than the {last} steps of this run"
            parts.append(f"On the learning curve {row} reaches {base}'s final accuracy {reached}.")
    return parts


def _has_curves(results: Results) -> bool:
    return all(run["curve"] for runs in results.values() for run in runs)


def titles_of(recipe: Recipe) -> dict[str, str]:
    return {name: row.get("title", name) for name, row in recipe.rows.items()}


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """(mean, half the width of its 95 % interval by Student's t); None for a single value, which tells no spread."""
    if len(values) < 2:
        return statistics.mean(values), None
    quantile = float(t.ppf(0.975, len(values) - 1))
    return statistics.mean(values), quantile * statistics.stdev(values) / len(values) ** 0.5


def with_interval(values: Sequence[float], sign: str = "", digits: int = 1) -> str:
    """The mean and half the width of its interval; empty where there is nothing."""
    if not values:
        return ""
    mean, half = interval(values)
    return f"{mean:{sign}.{digits}f}" + (f" ± {half:.{digits}f}" if half is not None else "")


def paired(results: Results, row: str, base: str | None, name: str = "accuracy") -> list[float]:
    """Differences in points to another row, one for each seed that both have; none to no row."""
    others = {run["seed"]: run for run in results.get(base or "", [])}
    return [_score(run, name) - _score(others[run["seed"]], name) for run in results[row] if run["seed"] in others]


def summary_table(comparison: Comparison) -> str:
    """A row a row: accuracy and its difference to its rival with intervals, and what it cost, all stages together.

    How long a step takes is an empty column where nobody has measured it.
    """
    results, titles, steps = comparison.results, titles_of(comparison.recipe), comparison.steps
    base = steps["base"] if steps else BASE
    lines = [
        f"| row | seeds | accuracy | difference to causal | parameters | tokens, M | FLOPs, T | time a step / {base} |",
        "| --- |" + " ---: |" * 7,
    ]
    for row, runs in results.items():
        difference = paired(results, row, compared_with(comparison.recipe, row))
        step = steps["rows"].get(row) if steps else None
        cells = [
            titles[row],
            str(len(runs)),
            with_interval([_score(run, "accuracy") for run in runs]),
            with_interval(difference, "+"),
            f"{runs[0]['parameters']:,}",
            f"{_cost(runs, 'tokens') / 1e6:.2f}",
            f"{_cost(runs, 'flops') / 1e12:.1f}",
            f"{step['ratio']:.2f}" if step else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines + _baselines(results, titles))


def _baselines(results: Results, titles: dict[str, str]) -> list[str]:
    """Rows of what can be had without looking; runs from before they were measured have none."""
    measured = {row: runs for row, runs in results.items() if all("baselines" in run for run in runs)}
    if not measured:
        return []
    row, runs = list(measured.items())[-1]
    names = {
        "majority": "majority answer of each skill or source",
        "blind": f"{titles[row]}, asked without the picture",
    }
    scores = {name: [100 * run["baselines"][name]["accuracy"] for run in runs] for name in names}
    return [f"| {title} | {len(runs)} | {with_interval(scores[name])} |" + " |" * 5 for name, title in names.items()]


def remarks(comparison: Comparison) -> list[str]:
    """What a reader must know to compare the rows fairly."""
    results, titles = comparison.results, titles_of(comparison.recipe)
    found = []
    if BASE in results:
        base = _cost(results[BASE], "flops")
        more = {row: _cost(runs, "flops") / base for row, runs in results.items()}
        named = [f"{titles[row]} {ratio:.2f} times" for row, ratio in more.items() if abs(ratio - 1) > _EQUAL_COMPUTE]
        found.append(
            "Compute: "
            + (f"{', '.join(named)} causal's FLOPs; all others had as many as causal." if named else "equal for all.")
            + " (6 x parameters without embeddings x tokens, as transformers counts them, all stages.)"
        )
    recipes = {row: row_recipe(comparison.recipe, comparison.recipe.rows[row], 0) for row in results}
    pretrained = {row: recipe.pretrain for row, recipe in recipes.items() if recipe.pretrain is not None}
    blind = [titles[row] for row, stage in pretrained.items() if stage.order == "text_first"]
    if blind:
        found.append(
            f"In {', '.join(blind)} pre-training has no label after the picture, so its encoder and connector get no "
            "gradient there: they first learn in SFT."
        )
    turned = [titles[row] for row, recipe in recipes.items() if recipe.stage("sft").order == "text_first"]
    echoed = [titles[row] for row, recipe in recipes.items() if recipe.stage("sft").order == "echo"]
    both = [titles[row] for row, recipe in recipes.items() if recipe.stage("sft").order == "both"]
    if turned or both or echoed:
        found.append(
            "Asked with the image first"
            + (f", except {', '.join(turned)}, trained and asked with the text first." if turned else ".")
            + (f" Trained in both orders: {', '.join(both)}." if both else "")
            + (
                f" Trained and asked with the question before the picture and after it: {', '.join(echoed)}."
                if echoed
                else ""
            )
        )
    asked = next((run["held_out"] for runs in results.values() for run in runs if "held_out" in run), None)
    if asked:
        found.append(
            f"Asked {asked['test']:,} held-out questions of {', '.join(asked['sources'])}; validation had "
            f"{asked['validation']:,} others. {asked['skipped']}."
        )
    if comparison.steps:
        found.append(
            f"Time a step: an SFT step of each row in turn, in one process on {comparison.steps['machine']}, with "
            f"batches that are ready; the median over {comparison.steps['rounds']} rounds of the row's seconds "
            f"relative to {comparison.steps['base']}'s in the same round."
        )
    return found


def rates_table(searched: dict[str, dict[float, float]]) -> str:
    """Row by learning rate; the one that was taken is bold."""
    rates = sorted({rate for by_rate in searched.values() for rate in by_rate})
    lines = ["| row | " + " | ".join(f"{rate:g}" for rate in rates) + " |", "| --- |" + " ---: |" * len(rates)]
    for row, by_rate in searched.items():
        best = max(by_rate, key=lambda rate: by_rate[rate])
        cells = [f"**{100 * by_rate[r]:.1f}**" if r == best else f"{100 * by_rate[r]:.1f}" for r in rates]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw_report(comparison: Comparison, path: Path) -> None:
    """Accuracy (left) and its difference to its rival on the same seeds (right): mean, 95 % interval, a dot a seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results, titles = comparison.results, titles_of(comparison.recipe)
    rows = list(results)
    figure, axes = plt.subplots(
        1, 2, figsize=(10, 1.2 + 0.42 * len(rows)), sharey=True, layout="constrained", width_ratios=(1, 1)
    )
    for place, row in enumerate(rows):
        values = [_score(run, "accuracy") for run in results[row]]
        panels = ((axes[0], values), (axes[1], paired(results, row, compared_with(comparison.recipe, row))))
        for axis, numbers in panels:
            if numbers:
                mean, half = interval(numbers)
                colour = "tab:gray" if row == BASE else "tab:blue"
                axis.errorbar(mean, place, xerr=half, fmt="o", color=colour, capsize=4, markersize=7)
                axis.plot(numbers, [place + 0.22] * len(numbers), ".", color=colour, alpha=0.45)
    axes[0].set_yticks(range(len(rows)), [titles[row] for row in rows])
    axes[0].invert_yaxis()
    axes[0].set_xlabel("held-out accuracy, %")
    axes[1].axvline(0, color="tab:gray", linewidth=1)
    axes[1].set_xlabel("difference to causal on the same seeds, points")
    for axis in axes:
        axis.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def seeds_table(results: Results) -> str:
    """Accuracy of every seed, and of searching where there is such a thing."""
    seeds = sorted({run["seed"] for runs in results.values() for run in runs})
    columns = [name for name in ("accuracy", "searching") if name in ("accuracy", *skills_of(results))]
    heads = " / ".join("all" if name == "accuracy" else name for name in columns)
    lines = [
        "| rule | " + " | ".join(f"seed {seed}: {heads}" for seed in seeds) + " |",
        "| --- |" + " ---: |" * len(seeds),
    ]
    for rule, runs in results.items():
        said = {run["seed"]: " / ".join(f"{_score(run, name):.1f}" for name in columns) for run in runs}
        cells = [said.get(seed, "") for seed in seeds]
        lines.append(f"| {rule} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def steps_to_reach(results: Results, rule: str, other: str) -> tuple[int | None, int]:
    """(the first step at which `rule`'s mean curve has the last value of `other`'s, None if never; all steps)."""
    target = mean_curve(results[other])[-1][1]
    curve = mean_curve(results[rule])
    return next((step for step, value in curve if value >= target), None), curve[-1][0]


def mean_curve(runs: list[dict[str, Any]], skill: str = "accuracy") -> list[tuple[int, float]]:
    """(step, mean accuracy in percent over seeds)."""
    return [
        (points[0]["step"], 100 * statistics.mean(point[skill] for point in points))
        for points in zip(*(run["curve"] for run in runs), strict=True)
    ]


def draw_curves(results: Results, path: Path) -> None:
    """Accuracy over SFT steps: all questions, and the searching skills where there are any; a thin line a seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels: list[tuple[str, tuple[str, ...]]] = [("all questions", ("accuracy",))]
    if "searching" in skills_of(results):
        panels.append(("searching: " + ", ".join(SEARCHING_SKILLS).replace("_", " "), SEARCHING_SKILLS))
    figure, axes = plt.subplots(
        1, len(panels), figsize=(5 * len(panels), 4), sharey=True, layout="constrained", squeeze=False
    )
    for axis, (title, skills) in zip(axes[0], panels, strict=True):
        for colour, (rule, runs) in zip((f"tab:{name}" for name in cycle(COLOURS)), results.items(), strict=False):
            steps = [point["step"] for point in runs[0]["curve"]]
            curves = [[100 * statistics.mean(point[s] for s in skills) for point in run["curve"]] for run in runs]
            for curve in curves if len(curves) > 1 else []:
                axis.plot(steps, curve, color=colour, alpha=0.25, linewidth=1)
            axis.plot(
                steps, [statistics.mean(values) for values in zip(*curves, strict=True)], color=colour, label=rule
            )
        axis.set_title(title)
        axis.set_xlabel("SFT step")
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("held-out accuracy, %")
    axes[0, 0].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def three_questions(recipe: Recipe, folder: Path, picture: Path) -> list[tuple[str, str, str]]:
    """Ask a trained model three questions about one held-out picture, which is saved: (question, answer, truth)."""
    import numpy as np

    from aki.apps.chat import answer
    from aki.data.digits import ask

    model, processor = AkiForConditionalGeneration.from_pretrained(folder), AkiProcessor.from_pretrained(folder)
    held_out = scenes(recipe, processor, 1, seed=2)
    scene, _ = held_out.scene(0)
    image = scene.draw(10 * held_out.image_size)  # for a person to see; the processor scales it down
    image.save(picture)
    rng = np.random.default_rng(recipe.seed)
    asked = [ask(rng, scene, skill) for skill in ("exists", "count_colour", "read")]
    return [
        (question, answer(model, processor, question, image), truth)
        for question, truth in (pair for pair in asked if pair is not None)
    ]


def _score(run: dict[str, Any], name: str) -> float:
    test = run["test"]
    value = statistics.mean(test[skill] for skill in SEARCHING_SKILLS) if name == "searching" else test[name]
    return 100 * value


def _words(names: Sequence[str]) -> str:
    return " and ".join(names).replace("_", " ")


def _mean(runs: list[dict[str, Any]], name: str) -> float:
    return statistics.mean(_score(run, name) for run in runs)


def _cost(runs: list[dict[str, Any]], name: str) -> float:
    """Tokens or FLOPs of pre-training, if there is one, and SFT, mean over seeds."""
    return statistics.mean(run[name] + (run["pretrain"] or {name: 0})[name] for run in runs)
