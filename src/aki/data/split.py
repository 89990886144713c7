"""Split captions: what stands before a drawn cut is prompt, which the picture may see; what follows is learned.

On a caption all of the text is a label, so a picture that saw it would hand it on to the tokens that are to be
predicted. What it may see can be no label, and what is a label it may not see: so a cut for each stretch of text.
"""

from __future__ import annotations

from random import Random

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from aki.layout import IGNORE_INDEX


def split_captions(
    labels: Tensor, prompt_block_ids: Tensor, tokenizer: PreTrainedTokenizerBase, seen: float, rng: Random
) -> tuple[Tensor, Tensor]:
    """Show the beginning of each stretch of labels to the pictures before it.

    Args:
        labels: (length,), one sample's.
        prompt_block_ids: (length,), -1 where there are labels.
        seen: the largest share of a stretch's text that may be drawn, 0 to 1; the share is uniform from 0.
        rng: a draw a stretch.

    Returns:
        Both with a cut in each stretch: -100 before it, and the block of the token before the stretch. At least one
        token of text is left to learn, and no character is cut.
    """
    labels, prompt_block_ids = labels.clone(), prompt_block_ids.clone()
    special = set(tokenizer.all_special_ids)
    for start, end in _stretches(labels):
        text = labels[start:end].tolist()
        while text and text[-1] in special:
            text.pop()
        cut = min(int(rng.random() * seen * (len(text) + 1)), len(text) - 1)
        while cut > 0 and tokenizer.decode(text[:cut]).endswith("\ufffd"):
            cut -= 1
        if cut > 0 and start > 0:
            labels[start : start + cut] = IGNORE_INDEX
            prompt_block_ids[start : start + cut] = prompt_block_ids[start - 1]
    return labels, prompt_block_ids


def _stretches(labels: Tensor) -> list[tuple[int, int]]:
    """Where each run of labels begins and ends."""
    learned = torch.nn.functional.pad((labels != IGNORE_INDEX).int(), (1, 1))
    steps = torch.diff(learned)
    return list(zip((steps == 1).nonzero()[:, 0].tolist(), (steps == -1).nonzero()[:, 0].tolist(), strict=True))
