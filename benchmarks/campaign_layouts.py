"""Layouts, right and wrong, before the guard: a part of the campaign. A model's gradients tell the truth."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch
from torch import Tensor

from aki import AkiConfig, AkiForConditionalGeneration
from aki.attention import check_no_leak, get_rule
from aki.attention.guard import LeakError, NothingOpensError

RULES = ("causal", "mma", "prefix", "image_bidirectional", "mma+image_bidirectional")
"""Those whose verdict is exact; that of concentric is an upper bound."""
IMAGE, PAD, TEXT, PER_IMAGE = 1, 0, range(2, 20), 2
_SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}


@dataclass
class Drawn:
    """A row: its ids, what is padding, the prompt block of each token and its label."""

    ids: list[int] = field(default_factory=list)
    real: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)

    def add(self, token: int, block: int, labelled: bool = False) -> None:
        self.ids.append(token)
        self.real.append(int(token != PAD))
        self.blocks.append(block)
        self.labels.append(token if labelled else -100)


def run(seed: int, tries: int) -> tuple[int, list[str]]:
    """
    Returns:
        The tries, and a sentence for each layout on which guard and gradients disagree.
    """
    draw, model, failures = random.Random(seed), _model(), []
    for number in range(tries):
        row, rule = _draw(draw), draw.choice(RULES)
        refused, leaks = _refused(model, rule, row), _leaks(model, rule, row)
        if refused != leaks:
            said = (
                f"the guard {'refuses' if refused else 'passes'} it and its gradients {'leak' if leaks else 'do not'}"
            )
            failures.append(f"layout {number} under {rule}: {said}: {row}")
    return tries, failures


def _draw(draw: random.Random) -> Drawn:
    """Turns of pictures, questions and answers; blocks may be too long or too short, padding may stand anywhere."""
    row = Drawn()
    for _ in range(draw.choice((0, 0, 2))):
        row.add(PAD, -1)
    for block in range(draw.randint(1, 3)):
        for _ in range(draw.randint(1, 3)):
            if draw.random() < 0.5:
                for _ in range(PER_IMAGE):
                    row.add(IMAGE, block)
            else:
                for _ in range(draw.randint(1, 3)):
                    row.add(draw.choice(TEXT), block)
        for _ in range(draw.choice((0, 0, 0, 2))):
            row.add(PAD, -1)
        # The template's mark of an answer stands before it: without one the last token of a question is supervised.
        too_long = draw.choice((0, 0, 0, 1))
        for place in range(draw.randint(1, 3)):
            row.add(draw.choice(TEXT), block if place < too_long else -1, draw.random() < 0.9)
    for _ in range(draw.choice((0, 0, 2))):
        row.add(PAD, -1)
    return row


def _model() -> AkiForConditionalGeneration:
    """Four layers in double precision, whose weights are large enough for every influence to show."""
    torch.manual_seed(0)
    vision = {"model_type": "siglip_vision_model", "num_hidden_layers": 1, "image_size": 4, "patch_size": 2} | _SIZES
    text = {"model_type": "llama", "num_hidden_layers": 4, "vocab_size": 20, "head_dim": 8, "num_key_value_heads": 2}
    config = AkiConfig(
        vision_config=vision,
        text_config=text | _SIZES | {"pad_token_id": PAD},
        connector_config={"num_latents": PER_IMAGE, "depth": 1, "num_heads": 2, "head_dim": 8},
        image_token_id=IMAGE,
    )
    model = AkiForConditionalGeneration(config).double().eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=1.0 if "embed" in name else 0.5)
    return model.requires_grad_(False)


def _refused(model: AkiForConditionalGeneration, rule: str, row: Drawn) -> bool:
    blocks, real = torch.tensor([row.blocks]), torch.tensor([row.real])
    ids, labels = torch.tensor([row.ids]), torch.tensor([row.labels])
    layout = model.layout(ids, attention_mask=real, prompt_block_ids=blocks, labels=labels, attention_rule=rule)
    try:
        check_no_leak(get_rule(rule), layout, labels)
    except NothingOpensError:
        return False
    except LeakError:
        return True
    return False


def _leaks(model: AkiForConditionalGeneration, rule: str, row: Drawn) -> bool:
    """Whether the loss at any position has a gradient with respect to what the decoder reads at a later one."""
    inputs: list[Tensor] = []

    def keep(module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        inputs.append(kwargs["inputs_embeds"].detach().requires_grad_())
        return args, {**kwargs, "inputs_embeds": inputs[0]}

    pictures = row.ids.count(IMAGE) // PER_IMAGE
    pixels = torch.randn(pictures, 3, 4, 4, generator=torch.Generator().manual_seed(1)).double()
    with model.model.language_model.register_forward_pre_hook(keep, with_kwargs=True):
        logits = model(
            input_ids=torch.tensor([row.ids]),
            pixel_values=pixels if pictures else None,
            attention_mask=torch.tensor([row.real]),
            prompt_block_ids=torch.tensor([row.blocks]),
            attention_rule=rule,
            use_cache=False,
        ).logits[0]
    labels = torch.tensor(row.labels[1:])
    losses = torch.nn.functional.cross_entropy(logits[:-1], labels, reduction="none", ignore_index=-100)
    for place in (labels != -100).nonzero()[:, 0].tolist():
        (gradient,) = torch.autograd.grad(losses[place], inputs[0], retain_graph=True)
        if bool((gradient[0, place + 1 :] != 0).any()):
            return True
    return False
