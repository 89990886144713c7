"""The command `aki`: it parses and calls."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

import tyro

from aki.training.recipe import STAGES, Recipe, RecipeError, load_recipe


def main(arguments: list[str] | None = None) -> None:
    """Run `aki COMMAND ...`; a wrong input ends with a sentence and exit code 2, Ctrl-C with 130."""
    parser = argparse.ArgumentParser("aki", description="Multimodal LLMs with modality-mutual attention.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (_add_train, _add_compare, _add_chat, _add_mask):
        add(commands)
    options, overrides = parser.parse_known_args(arguments)
    try:
        if overrides and not options.takes_overrides:
            raise RecipeError(f"aki {options.command} does not know {' '.join(overrides)}; see aki {options.command} --help.")
        options.run(options, overrides)
    except KeyboardInterrupt:
        print("\naki: interrupted; what was finished is kept, and --resume goes on from the last checkpoint.", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(f"aki: {error}", file=sys.stderr)
        sys.exit(2)


def _command(commands, name: str, run: Callable, help: str, takes_overrides: bool = False) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=help, description=help, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.set_defaults(run=run, takes_overrides=takes_overrides)
    if takes_overrides:
        parser.add_argument("recipe", type=Path, help="a YAML file; every field can be overridden: --sft.steps 100")
    return parser


def _add_train(commands) -> None:
    parser = _command(commands, "train", _train, "Train the stages of a recipe.", takes_overrides=True)
    parser.add_argument("--output", type=Path, help="where the models go (runs/NAME)")
    parser.add_argument("--stage", choices=("all", *STAGES), default="all", help="which stage; its model goes to --output")
    parser.add_argument("--start-from", type=Path, help="a folder with the model that the first stage starts from")
    parser.add_argument("--resume", action="store_true", help="go on from the last whole checkpoint")
    parser.add_argument("--machine", action="store_true", help=argparse.SUPPRESS)


def _train(options: argparse.Namespace, overrides: list[str]) -> None:
    from aki.training.stages import Job, run_stage

    recipe = _recipe(options.recipe, overrides)
    output = options.output or Path("runs") / recipe.name
    stages = STAGES if options.stage == "all" else (options.stage,)
    start_from = options.start_from
    for name in stages:
        folder = output / name if options.stage == "all" else output
        if not options.machine:
            stage = recipe.stage(name)
            start = start_from or "random weights"
            print(f"{name}: {stage.steps} steps of {stage.batch_size}, rule {stage.rule}, from {start} to {folder}")
        result = run_stage(Job(recipe, name, folder, start_from, options.resume, name, options.machine))
        if not options.machine:
            scores = result.get("test", {})
            print(*(f"  {skill} {value:.3f}" for skill, value in scores.items()), f"  saved in {folder}", sep="\n")
        start_from = folder


def _add_compare(commands) -> None:
    parser = _command(
        commands, "compare", _compare, "Train rules from the same start and compare them.", takes_overrides=True
    )
    parser.add_argument("--output", type=Path, required=True, help="where models and the report go; a second call goes on")
    parser.add_argument("--rules", nargs="+", default=["causal", "mma"])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--parallel", type=int, default=2, help="trainings at a time")


def _compare(options: argparse.Namespace, overrides: list[str]) -> None:
    from aki.evaluation.compare import run_comparison
    from aki.evaluation.report import draw_curves, seeds_table, steps_to_reach, table, three_questions

    recipe = _recipe(options.recipe, overrides)
    results = run_comparison(recipe, options.output, options.rules, options.seeds, options.parallel)
    report = f"Held-out accuracy in percent after {recipe.sft.steps} SFT steps, mean of {options.seeds} seed(s)\n\n"
    report += table(results) + "\n"
    if options.seeds > 1:
        report += "\n" + seeds_table(results) + "\n"
    for rule in options.rules:
        if rule != "causal" and "causal" in options.rules:
            step, last = steps_to_reach(results, rule)
            reached = f"at step {step} of {last}" if step else f"not within {last} steps"
            report += f"\n{rule} reaches causal's final accuracy on the learning curve {reached}.\n"
    (options.output / "report.md").write_text(report)
    draw_curves(results, options.output / "curves.png")
    print("\n" + report)
    best = options.output / options.rules[-1]
    picture = options.output / "scene.png"
    for question, said, truth in three_questions(recipe, best, picture):
        print(f"{question}  {said}" + ("" if said == truth else f"  (it is {truth})"))
    print(f"\nThe picture: {picture}. The report: {options.output}/report.md, curves.png. Ask more:")
    print(f'  aki chat {best} --image {picture} "how many digits are red?"')


def _add_chat(commands) -> None:
    parser = _command(commands, "chat", _chat, "Ask a model about a picture.")
    parser.add_argument("model", help="a folder or hub id")
    parser.add_argument("question", nargs="?", help="read from standard input if absent")
    parser.add_argument("--image", help="path or URL")
    parser.add_argument("--rule", help="another attention rule than the model's")
    parser.add_argument("--max-new-tokens", type=int, default=128)


def _chat(options: argparse.Namespace, overrides: list[str]) -> None:
    from aki.apps.chat import answer, load

    question = options.question if options.question is not None else sys.stdin.read()
    model, processor = load(options.model)

    def emit(piece: str) -> None:
        print(piece, end="", flush=True)

    answer(
        model,
        processor,
        question,
        options.image,
        max_new_tokens=options.max_new_tokens,
        attention_rule=options.rule,
        emit=emit,
    )
    print()


def _add_mask(commands) -> None:
    parser = _command(commands, "mask", _mask, "Draw which token sees which, beside causal attention.")
    parser.add_argument("--rule", default="mma")
    parser.add_argument("--picture", type=Path, default=Path("mask.png"))


def _mask(options: argparse.Namespace, overrides: list[str]) -> None:
    from aki.apps.pictures import draw_masks

    rules = list(dict.fromkeys(["causal", options.rule]))
    for name, (pairs, opened) in draw_masks(rules, options.picture).items():
        print(f"{name}: {pairs} pairs, {opened} beyond causal")
    print(f"drawn in {options.picture}")


def _recipe(path: Path, overrides: list[str]) -> Recipe:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    recipe = load_recipe(path)
    return tyro.cli(Recipe, args=overrides, default=recipe, prog=f"aki ... {path}") if overrides else recipe
