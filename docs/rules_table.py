"""Writes the table of `docs/rules.md` from the leak guard's verdicts: `python docs/rules_table.py`."""

from __future__ import annotations

from pathlib import Path

import torch

from aki.attention import RULES, LeakError, check_no_leak, get_rule
from aki.attention.guard import NothingOpensError
from aki.attention.segments import far
from aki.data.collate import ChatCollator
from aki.data.digits import DigitScenes
from aki.data.orders import template_in_order
from aki.models import AkiForConditionalGeneration, AkiProcessor
from aki.training.recipe import load_recipe
from aki.training.stages import build_model

PAGE = Path(__file__).with_name("rules.md")
RECIPE = "digits"
BEGIN, END = "<!-- made by docs/rules_table.py -->", "<!-- end -->"
NAMES = [*RULES, "mma+image_bidirectional"]
STAGES = {
    "pre-training: captions": ("caption", "image_first"),
    "captions, text first": ("caption", "text_first"),
    "SFT: questions": ("question", "image_first"),
    "questions, text first": ("question", "text_first"),
}
WRONG = "a block one token too long"


def verdict(rule: str, model: AkiForConditionalGeneration, batch: dict[str, torch.Tensor]) -> str:
    """What the guard says of training on a batch by a rule."""
    layout = model.layout(
        batch["input_ids"],
        attention_mask=batch["attention_mask"],
        prompt_block_ids=batch["prompt_block_ids"],
        labels=batch["labels"],
        attention_rule=rule,
    )
    try:
        check_no_leak(get_rule(rule), layout, batch["labels"])
    except NothingOpensError:
        return "no: opens nothing"
    except LeakError:
        return "**no: leaks**"
    last = far(get_rule(rule), layout)
    ahead = (last > torch.arange(layout.shape[1])) & ~layout.is_padding
    if not ahead.any():
        return "yes, as causal"
    if bool((ahead & ~layout.is_media).any()):
        return "yes: the prompt to itself"
    sees_text = ahead & ~layout.is_media.gather(1, last.clamp(min=0))
    return "yes: the picture to the text" if bool(sees_text.any()) else "yes: the picture to itself"


def batches(processor: AkiProcessor) -> dict[str, dict[str, torch.Tensor]]:
    """A batch of each stage and order, and one of questions whose prompts are said to go on into the answer."""
    found = {}
    for stage, (task, order) in STAGES.items():
        template = template_in_order(processor, "caption" if task == "caption" else "default", order)
        scenes = DigitScenes("train", task, 4, 24)
        found[stage] = ChatCollator(processor, 512, template)([scenes[i] for i in range(4)])
    wrong = {name: tensor.clone() for name, tensor in found["SFT: questions"].items()}
    blocks = wrong["prompt_block_ids"]
    first_answer = (blocks[:, 1:] < 0) & (blocks[:, :-1] >= 0)
    blocks[:, 1:][first_answer] = 0
    return found | {WRONG: wrong}


def table() -> str:
    torch.manual_seed(0)
    model, processor = build_model(load_recipe(RECIPE))
    columns = batches(processor)
    lines = ["| rule | " + " | ".join(columns) + " |", "| --- |" + " --- |" * len(columns)]
    for rule in NAMES:
        cells = [verdict(rule, model, batch) for batch in columns.values()]
        lines.append(f"| `{rule}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    before, rest = PAGE.read_text().split(BEGIN)
    _, after = rest.split(END)
    PAGE.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}")


if __name__ == "__main__":
    main()
