"""What a comparison says: a table, a picture, and three questions answered."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scipy.stats import t

from aki.data.digits import SEARCHING_SKILLS, SKILLS
from aki.evaluation.compare import Comparison
from aki.evaluation.plan import row_recipe
from aki.models import AkiForConditionalGeneration, AkiProcessor
from aki.training.recipe import Recipe
from aki.training.stages import questions

Results = dict[str, list[dict[str, Any]]]
"""Row -> what was measured, one a seed."""

_EQUAL_COMPUTE = 0.02


def table(results: Results) -> str:
    """Held-out accuracy in percent as Markdown: a row a rule (mean over seeds), then the difference to causal."""
    columns = ["accuracy", *SKILLS, "searching"]
    lines = [
        "| rule | " + " | ".join("all" if name == "accuracy" else name.replace("_", " ") for name in columns) + " |",
        "| --- |" + " ---: |" * len(columns),
    ]
    for rule, runs in results.items():
        lines.append(f"| {rule} | " + " | ".join(f"{_mean(runs, name):.1f}" for name in columns) + " |")
    for rule in results:
        if rule != "causal" and paired(results, rule):
            gains = [statistics.mean(paired(results, rule, name)) for name in columns]
            lines.append(f"| {rule} - causal | " + " | ".join(f"{gain:+.1f}" for gain in gains) + " |")
    return "\n".join(lines)


def write_report(comparison: Comparison, folder: Path) -> str:
    """Write `report.md`, `report.png`, and `curves.png` where there are learning curves; returns the report's text."""
    report = "\n\n".join(report_parts(comparison)) + "\n"
    (folder / "report.md").write_text(report)
    draw_report(comparison.results, titles_of(comparison.recipe), folder / "report.png")
    if _has_curves(comparison.results):
        draw_curves(comparison.results, folder / "curves.png")
    return report


def report_parts(comparison: Comparison) -> list[str]:
    """The paragraphs and tables of a report."""
    results, titles = comparison.results, titles_of(comparison.recipe)
    parts = [
        "Held-out accuracy in percent: mean over seeds ± 95 % interval (t), and the difference to causal on the same "
        "seeds.",
        summary_table(results, titles),
        *remarks(comparison),
        "By skill (mean over seeds; searching is the mean of "
        + " and ".join(SEARCHING_SKILLS).replace("_", " ")
        + "):",
        table(results),
    ]
    if max(map(len, results.values())) > 1:
        parts += ["Every seed:", seeds_table(results)]
    if comparison.searched:
        parts += ["SFT's learning rates, tried on a seed of their own (accuracy on the validation questions):"]
        parts += [rates_table(comparison.searched)]
    for row in results:
        if _has_curves(results) and row != "causal" and "causal" in results:
            step, last = steps_to_reach(results, row)
            reached = f"at step {step} of {last}" if step else f"later than the {last} steps of this run"
            parts.append(f"On the learning curve {row} reaches causal's final accuracy {reached}.")
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


def paired(results: Results, row: str, name: str = "accuracy", base: str = "causal") -> list[float]:
    """Differences in points to another row, one for each seed that both have."""
    others = {run["seed"]: run for run in results.get(base, [])}
    return [_score(run, name) - _score(others[run["seed"]], name) for run in results[row] if run["seed"] in others]


def summary_table(results: Results, titles: dict[str, str]) -> str:
    """A row a row: accuracy and its difference to causal with intervals, and what it cost, both stages together."""
    lines = [
        "| row | seeds | accuracy | difference to causal | parameters | tokens, M | FLOPs, T | time a step / causal |",
        "| --- |" + " ---: |" * 7,
    ]
    for row, runs in results.items():
        difference = paired(results, row) if row != "causal" else []
        ratios = step_ratios(results, row)
        cells = [
            titles[row],
            str(len(runs)),
            _with_interval([_score(run, "accuracy") for run in runs], ".1f"),
            _with_interval(difference, "+.1f") if difference else "",
            f"{runs[0]['parameters']:,}",
            f"{_cost(runs, 'tokens') / 1e6:.2f}",
            f"{_cost(runs, 'flops') / 1e12:.1f}",
            f"{statistics.median(ratios):.2f}" if ratios else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def step_ratios(results: Results, row: str) -> list[float]:
    """Median seconds of an SFT step relative to causal's of the same seed."""
    others = {run["seed"]: run["step_seconds"] for run in results.get("causal", [])}
    return [
        run["step_seconds"] / others[run["seed"]]
        for run in results[row]
        if run["step_seconds"] and others.get(run["seed"])
    ]


def remarks(comparison: Comparison) -> list[str]:
    """What a reader must know to compare the rows fairly."""
    results, titles = comparison.results, titles_of(comparison.recipe)
    found = []
    if "causal" in results:
        base = _cost(results["causal"], "flops")
        more = {row: _cost(runs, "flops") / base for row, runs in results.items()}
        named = [f"{titles[row]} {ratio:.2f} times" for row, ratio in more.items() if abs(ratio - 1) > _EQUAL_COMPUTE]
        found.append(
            "Compute: "
            + (f"{', '.join(named)} causal's FLOPs; all others had as many as causal." if named else "equal for all.")
            + " (6 x parameters without embeddings x tokens, as transformers counts them, both stages.)"
        )
    recipes = {row: row_recipe(comparison.recipe, comparison.recipe.rows[row], 0) for row in results}
    blind = [titles[row] for row, recipe in recipes.items() if recipe.stage("pretrain").order == "text_first"]
    if blind:
        found.append(
            f"In {', '.join(blind)} pre-training has no label after the picture, so its encoder and connector get no "
            "gradient there: they first learn in SFT."
        )
    turned = [titles[row] for row, recipe in recipes.items() if recipe.stage("sft").order == "text_first"]
    both = [titles[row] for row, recipe in recipes.items() if recipe.stage("sft").order == "both"]
    if turned or both:
        found.append(
            "Asked with the image first, except "
            + (f"{', '.join(turned)}, trained and asked with the text first." if turned else "none.")
            + (f" Trained in both orders: {', '.join(both)}." if both else "")
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


def draw_report(results: Results, titles: dict[str, str], path: Path) -> None:
    """Accuracy (left) and its difference to causal on the same seeds (right): mean, 95 % interval, a dot a seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = list(results)
    figure, axes = plt.subplots(
        1, 2, figsize=(10, 1.2 + 0.42 * len(rows)), sharey=True, layout="constrained", width_ratios=(1, 1)
    )
    for place, row in enumerate(rows):
        values = [_score(run, "accuracy") for run in results[row]]
        panels = ((axes[0], values), (axes[1], paired(results, row) if row != "causal" else []))
        for axis, numbers in panels:
            if numbers:
                mean, half = interval(numbers)
                colour = "tab:gray" if row == "causal" else "tab:blue"
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
    """Overall and searching accuracy of every seed."""
    seeds = sorted({run["seed"] for runs in results.values() for run in runs})
    lines = [
        "| rule | " + " | ".join(f"seed {seed}: all / searching" for seed in seeds) + " |",
        "| --- |" + " ---: |" * len(seeds),
    ]
    for rule, runs in results.items():
        said = {run["seed"]: f"{_score(run, 'accuracy'):.1f} / {_score(run, 'searching'):.1f}" for run in runs}
        cells = [said.get(seed, "") for seed in seeds]
        lines.append(f"| {rule} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def steps_to_reach(results: Results, rule: str, other: str = "causal") -> tuple[int | None, int]:
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
    """Accuracy over SFT steps: all questions on the left, the searching skills on the right; a thin line a seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    panels = (
        ("all questions", ("accuracy",)),
        ("searching: " + ", ".join(SEARCHING_SKILLS).replace("_", " "), SEARCHING_SKILLS),
    )
    for axis, (title, skills) in zip(axes, panels, strict=True):
        for colour, (rule, runs) in zip(
            ("tab:gray", "tab:blue", "tab:orange", "tab:green"), results.items(), strict=False
        ):
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
    axes[0].set_ylabel("held-out accuracy, %")
    axes[0].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def three_questions(recipe: Recipe, folder: Path, picture: Path) -> list[tuple[str, str, str]]:
    """Ask a trained model three questions about one held-out picture, which is saved: (question, answer, truth)."""
    import numpy as np

    from aki.apps.chat import answer
    from aki.data.digits import ask

    model, processor = AkiForConditionalGeneration.from_pretrained(folder), AkiProcessor.from_pretrained(folder)
    held_out = questions(recipe, processor, "test", 1, seed=2)
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


def _mean(runs: list[dict[str, Any]], name: str) -> float:
    return statistics.mean(_score(run, name) for run in runs)


def _cost(runs: list[dict[str, Any]], name: str) -> float:
    """Tokens or FLOPs of pre-training and SFT, mean over seeds."""
    return statistics.mean(run[name] + run["pretrain"][name] for run in runs)


def _with_interval(values: Sequence[float], form: str) -> str:
    mean, half = interval(values)
    return f"{mean:{form}}" + (f" ± {half:.1f}" if half is not None else "")
