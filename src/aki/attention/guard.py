"""The leak guard: refuses a batch in which a token is learned from its own future.

Row q is supervised when labels[q + 1] is a label, also where it is padding: what the loss trains decides. It leaks when
what q sees, directly or through other tokens over any number of layers, reaches past q. With a rule that contains
causal attention it does so exactly where the running maximum of `far` within the document does: the first step past q
is taken from a token at or before q, and q sees all of those. So the guard needs no mask and is linear in the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aki.attention.rules import Rule
from aki.attention.segments import far, segments
from aki.layout import IGNORE_INDEX, SequenceLayout

CHOOSE_CAUSAL = "attention_rule='causal'"
"""How these errors tell a caller to choose the causal rule."""


class LeakError(ValueError):
    """Training on this batch would show the model its own answer."""


class NothingOpensError(LeakError):
    """Training on this batch would not use the rule it is named after."""


def reach(rule: Rule, layout: SequenceLayout) -> Tensor:
    """(batch, length): the last position that is seen by a token or by those before it in its document.

    It is past the token exactly if the token learns of its future through any number of layers; with a rule that does
    not contain causal attention, it may also be past a token that does not.
    """
    # Documents stand one behind the other and far stays inside each, so no maximum crosses into the next.
    return far(rule, layout).cummax(1).values


def check_no_leak(rule: Rule, layout: SequenceLayout, labels: Tensor) -> None:
    """Refuse a training batch that leaks, or in which a rule beyond causal is causal attention.

    Args:
        labels: (batch, length), -100 is not learned; what stands on media tokens is ignored.

    Raises:
        LeakError: with the row, the rule and the path of the leak.
        NothingOpensError: the rule opens nothing, and takes nothing away.
    """
    labels = labels.masked_fill(layout.is_media, IGNORE_INDEX)
    supervised = torch.nn.functional.pad(labels[:, 1:] != IGNORE_INDEX, (0, 1))
    position = torch.arange(labels.shape[1], device=labels.device)
    ahead = reach(rule, layout) > position
    leaks = ahead & supervised
    if leaks.any():
        raise LeakError(_leak_message(rule, layout, leaks))
    may_open = rule.name != "causal" and layout.is_media.any() and supervised.any()
    if may_open and not ahead.any() and segments(rule, layout) == segments("causal", layout):
        raise NothingOpensError(
            f"the rule {rule.name!r} opens nothing in this batch: no picture has prompt text that it could see, "
            f"because every text token after it is a label. On captions train with {CHOOSE_CAUSAL} (as the "
            "paper does in pre-training); on questions, label the answers only."
        )


def _leak_message(rule: Rule, layout: SequenceLayout, leaks: Tensor) -> str:
    row, q = (int(i) for i in leaks.nonzero()[0])
    last = far(rule, layout)[row]
    through = int((last[: q + 1] > q).nonzero()[0])
    seen = int(last[through])
    kind = "media token" if bool(layout.is_media[row, through]) else "token"
    return (
        f"the rule {rule.name!r} leaks in row {row}: position {q} is trained to predict token {q + 1}, but it sees the "
        f"{kind} at {through}, which sees up to token {seen}. A prompt block must end with the token that starts the "
        f"answer (here block {int(layout.prompt_block[row, through])} runs into the labels): "
        f"check prompt_block_ids, or train with {CHOOSE_CAUSAL}."
    )
