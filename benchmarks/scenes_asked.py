"""What goes through what a rule opens: models of the recipe `scenes` asked causally, under MMA, and under MMA in half
of their layers, and the share of attention that their pictures pay to the question behind them.

    python benchmarks/scenes_asked.py

For each finished cell whose model still lies in the folder; a cell is measured once (`FOLDER/asked/CELL.json`).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from aki.data.collate import ChatCollator
from aki.data.packing import PackedCollator
from aki.data.scenes.questions import SKILLS
from aki.evaluation.compare import load_comparison
from aki.evaluation.plan import row_recipe
from aki.files import write_json
from aki.layout import IGNORE_INDEX
from aki.models.adapters import has_model
from aki.models.explain import attention_weights
from aki.models.rule import base_model
from aki.training.held_out import held_out
from aki.training.predictions import means_by_group
from aki.training.recipe import Recipe, load_recipe
from aki.training.scoring import all_foretold, log_likelihoods, logits_of_labels
from aki.training.start import load_start, set_rule

RULES = ("causal", "mma")
LOOKED_AT = 32
"""Pictures of which attention is measured; eager attention is slow."""


@contextmanager
def opened_in(model: Any, layers: Sequence[int]) -> Iterator[None]:
    """The model's rule in these layers of its language model, causal attention in the others. Needs dense masks."""

    def causal(module: Any, arguments: tuple, options: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        mask = options["attention_mask"]
        # All rules asked here contain causal attention, which is therefore their lower triangle.
        return arguments, options | {"attention_mask": mask & torch.ones_like(mask).tril()}

    decoder = base_model(model).get_decoder().layers
    hooks = [
        layer.register_forward_pre_hook(causal, with_kwargs=True)
        for number, layer in enumerate(decoder)
        if number not in layers
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def asked(model: Any, processor: Any, recipe: Recipe, attention: str) -> dict[str, Any]:
    """Accuracy, and nats an answer, by skill under each rule and in half of the layers; and shares of attention."""
    stage = recipe.stage("sft")
    # A model that was trained in another order has that order as its template.
    collator = ChatCollator(processor, stage.max_length)
    padded = PackedCollator(processor.tokenizer.pad_token_id)

    parts = held_out(recipe, stage, collator)
    assert parts is not None
    samples = map(parts.test.__getitem__, range(len(parts.test)))  # type: ignore[arg-type]
    # The other kinds of things and words are asked once, when the model is trained.
    questions = [(sample.skill, collator.encode(sample)[0]) for sample in samples if sample.skill in SKILLS]

    found: dict[str, Any] = {"under": {}, "nats": {}}

    def score(name: str) -> None:
        right: list[tuple[float, str]] = []
        nats: list[tuple[float, str]] = []
        for start in range(0, len(questions), stage.batch_size):
            skills, encoded = zip(*questions[start : start + stage.batch_size], strict=True)
            # In the numbers in which the trainer asked it.
            with torch.autocast(model.device.type, torch.bfloat16, enabled=recipe.bf16):
                logits, labels = logits_of_labels(model, padded(encoded))
            right += zip(all_foretold(logits, labels).tolist(), skills, strict=True)
            nats += zip((-log_likelihoods(logits, labels)).tolist(), skills, strict=True)
        found["under"][name], found["nats"][name] = means_by_group(right), means_by_group(nats)

    for rule in dict.fromkeys((*RULES, stage.rule)):
        set_rule(model, processor, rule, attention)
        score(rule)
    layers = len(base_model(model).get_decoder().layers)
    set_rule(model, processor, "mma", "sdpa")
    for name, half in (("lower", range(layers // 2)), ("upper", range(layers // 2, layers))):
        with opened_in(model, half):
            score(f"mma, {name} half")
    set_rule(model, processor, stage.rule, attention)
    shares = [paid_to_question(model, padded([encoded])) for _, encoded in questions[:LOOKED_AT]]
    pictured = [share for share in shares if share is not None]
    found["paid"] = torch.stack(pictured).mean(0).tolist() if pictured else []
    return found


def paid_to_question(model: Any, inputs: dict[str, Tensor]) -> Tensor | None:
    """(layers,) the share of attention that image tokens pay to the prompt behind them; None without a picture."""
    labels = inputs["labels"]
    image = (inputs["input_ids"] == base_model(model).config.image_token_id)[0]
    if not image.any():
        return None
    behind = torch.arange(len(image)) > int(image.nonzero()[-1])
    question = behind & (labels[0] == IGNORE_INDEX)
    weights = attention_weights(model, {name: tensor for name, tensor in inputs.items() if name != "labels"})
    return weights[:, image][:, :, question].sum(-1).mean(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--recipe", default="scenes")
    parser.add_argument("--folder", type=Path, default=Path("results/scenes"), help="what `aki compare` wrote into")
    parser.add_argument("--rows", nargs="*", help="of the recipe; all if absent")
    options = parser.parse_args()
    measure(load_recipe(options.recipe), options.folder, options.rows)


def measure(recipe: Recipe, folder: Path, rows: Sequence[str] | None = None) -> None:
    results = load_comparison(recipe, folder, list(rows or recipe.rows)).results
    runs = [(row, run) for row, of_row in results.items() for run in of_row]
    for row, run in tqdm(runs, desc="asked", unit="cell"):
        file, trained = folder / "asked" / f"{run['cell']}.json", folder / run["cell"]
        if file.exists() or not has_model(trained):
            continue
        own = row_recipe(recipe, recipe.rows[row], run["seed"])
        model, processor = load_start(trained)
        model.eval()
        file.parent.mkdir(exist_ok=True)
        write_json(file, {"row": row, "seed": run["seed"], **asked(model, processor, own, own.attention)})


if __name__ == "__main__":
    main()
