"""Where the answers of a chat stand: as its template marks them, as prompt blocks, and as labels."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from threading import get_ident

from torch import Tensor

from aki.layout import IGNORE_INDEX


def of_this_thread(template: str | None) -> str | None:
    """The same template for one thread alone.

    transformers keeps a compiled template for all threads, and within it where answers stand, which they would write
    over each other's.
    """
    if not template:
        return template
    # Jinja drops one line break at the end, and one behind a comment.
    body = template.removesuffix("\n")
    return f"{body}{{# {get_ident()} #}}{template[len(body) :]}"


def tokens_in(characters: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[int]:
    """1 for each token that shares a character with one of the spans.

    Args:
        characters: (first, end) of each token; of padding and what a tokenizer adds these are equal.
        spans: (first, end).
    """
    answers = [0] * len(characters)
    for first, end in spans:
        for token, (token_first, token_end) in enumerate(characters):
            if token_first < end and token_end > first:
                answers[token] = 1
    return answers


def labels_from_prompt_blocks(
    input_ids: Tensor, attention_mask: Tensor, prompt_block_ids: Tensor, *media_token_ids: int
) -> Tensor:
    """Labels for training on answers alone: every token outside prompt blocks, padding and media; -100 elsewhere.

    Args:
        input_ids: (batch, length); the others have the same shape.
        media_token_ids: the placeholders, `AkiProcessor.media_token_ids`.
    """
    learned = (prompt_block_ids < 0) & (attention_mask == 1)
    for token_id in media_token_ids:
        learned &= input_ids != token_id
    return input_ids.masked_fill(~learned, IGNORE_INDEX)


def prompt_blocks(
    input_ids: list[int], attention_mask: list[int], answers: list[int], answer_token_id: int | None
) -> list[int]:
    """The prompt block of each token of a chat, -1 for answers and padding.

    Args:
        answers: 1 for what stands between the generation tags of the chat template.
        answer_token_id: starts an answer and belongs to the prompt.
    """
    starts_answer = [token == answer_token_id for token in input_ids]
    prompt = [
        bool(real and (start or not answer))
        for real, start, answer in zip(attention_mask, starts_answer, answers, strict=True)
    ]
    blocks, block = [-1] * len(input_ids), 0
    for is_prompt, run in groupby(range(len(input_ids)), key=prompt.__getitem__):
        if is_prompt:
            positions = list(run)
            # White space that a template writes after the token is answer (paper, section 3).
            end = max((p for p in positions if starts_answer[p]), default=positions[-1]) + 1
            blocks[positions[0] : end] = [block] * (end - positions[0])
            block += 1
    return blocks
