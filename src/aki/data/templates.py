"""The texts of questions (paper, section 4). The chat around them is the processor's: models/templates.py."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from string import ascii_uppercase

SHORT_ANSWER = "Answer the question using a single word or phrase. {question}"
YES_OR_NO = SHORT_ANSWER + " Please answer yes or no."
LETTER = "Answer with the option's letter from the given choices directly. {question}\n{context}Options:\n{options}"
CONTEXT = "Context: {hint}\n"
REGION = "Provide a short description for this region. <bbox>[{0:.3f}, {1:.3f}][{2:.3f}, {3:.3f}]</bbox>"


def short_answer(question: str) -> str:
    return SHORT_ANSWER.format(question=question)


def yes_or_no(question: str) -> str:
    return YES_OR_NO.format(question=question)


def letter(question: str, choices: Sequence[str], answer: int, rng: Random, hint: str | None = None) -> tuple[str, str]:
    """A question with its options in a drawn order, and the letter of the right one.

    Args:
        answer: the index of the right choice.
        hint: context that is given before the options; None leaves the line out.

    Raises:
        ValueError: there is no such choice, or more choices than letters.
    """
    if not 0 <= answer < len(choices) <= len(ascii_uppercase):
        raise ValueError(f"choice {answer} of {len(choices)} cannot be asked for by letter.")
    order = rng.sample(range(len(choices)), len(choices))
    options = "".join(f"{ascii_uppercase[place]}. {choices[choice]}\n" for place, choice in enumerate(order))
    context = "" if hint is None else CONTEXT.format(hint=hint)
    return LETTER.format(question=question, context=context, options=options), ascii_uppercase[order.index(answer)]


def region(box: Sequence[float]) -> str:
    """Ask for the phrase of a region.

    Args:
        box: x1, y1, x2, y2, 0 to 1.
    """
    return REGION.format(*box)
