"""What a comparison says: a table, a picture, and three questions answered."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from aki.data.digits import SEARCHING_SKILLS, SKILLS
from aki.models import AkiForConditionalGeneration, AkiProcessor
from aki.training.recipe import Recipe
from aki.training.stages import questions

Results = dict[str, list[dict[str, Any]]]


def table(results: Results) -> str:
    """Held-out accuracy in percent as Markdown: a row a rule (mean over seeds), then the difference to causal."""
    columns = ["accuracy", *SKILLS, "searching"]
    lines = [
        "| rule | " + " | ".join("all" if name == "accuracy" else name.replace("_", " ") for name in columns) + " |",
        "| --- |" + " ---: |" * len(columns),
    ]
    for rule, runs in results.items():
        lines.append(f"| {rule} | " + " | ".join(f"{_mean(runs, name):.1f}" for name in columns) + " |")
    for rule, runs in results.items():
        if rule != "causal" and "causal" in results:
            gains = [_mean(runs, name) - _mean(results["causal"], name) for name in columns]
            lines.append(f"| {rule} - causal | " + " | ".join(f"{gain:+.1f}" for gain in gains) + " |")
    return "\n".join(lines)


def write_report(results: Results, steps: int, folder: Path) -> str:
    """Write `report.md`, and `curves.png` where there are any, to the folder; returns the report's text."""
    seeds = len(next(iter(results.values())))
    parts = [f"Held-out accuracy in percent after {steps} SFT steps, mean of {seeds} seed(s)", table(results)]
    if seeds > 1:
        parts.append(seeds_table(results))
    has_curves = all(run["curve"] for runs in results.values() for run in runs)
    for rule in results:
        if has_curves and rule != "causal" and "causal" in results:
            step, last = steps_to_reach(results, rule)
            reached = f"at step {step} of {last}" if step else f"later than the {last} steps of this run"
            parts.append(f"On the learning curve {rule} reaches causal's final accuracy {reached}.")
    report = "\n\n".join(parts) + "\n"
    (folder / "report.md").write_text(report)
    if has_curves:
        draw_curves(results, folder / "curves.png")
    return report


def seeds_table(results: Results) -> str:
    """Overall and searching accuracy of every seed."""
    seeds = [run["seed"] for run in next(iter(results.values()))]
    lines = [
        "| rule | " + " | ".join(f"seed {seed}: all / searching" for seed in seeds) + " |",
        "| --- |" + " ---: |" * len(seeds),
    ]
    for rule, runs in results.items():
        cells = [f"{_score(run, 'accuracy'):.1f} / {_score(run, 'searching'):.1f}" for run in runs]
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
