"""How an answer is scored against the right ones, by name: 0 to 1."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

Metric = Callable[[str, Sequence[str]], float]
"""Of what was said, and all answers that are right."""

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"none": "0"}
_ARTICLES = {"a", "an", "the"}
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_THRESHOLD = 0.5
"""ANLS: more than half of the characters wrong is no answer (arXiv 1907.00490, eq. 1)."""
_TOLERANCE = 0.05
"""Relaxed accuracy: of a number, arXiv 2203.10244, section 5.1."""
_PEOPLE = 3
"""VQA: an answer that so many others gave is wholly right."""


def exact(said: str, golds: Sequence[str]) -> float:
    """Whether it is one of the texts, but for blanks around it."""
    return float(said.strip() in [gold.strip() for gold in golds])


def vqa(said: str, golds: Sequence[str]) -> float:
    """VQA's accuracy (arXiv 1505.00468, section 3.3): 1 if three others gave the answer, a third less for each that is
    missing, the mean over leaving each of the people out. Texts are compared without case, articles, punctuation and
    apostrophes, numbers up to ten as digits.

    Args:
        golds: one answer a person. Of fewer than four all others are needed; a single one is right or wrong.
    """
    given = [_plain(gold) == _plain(said) for gold in golds]
    if len(given) == 1:
        return float(given[0])
    needed = min(_PEOPLE, len(given) - 1)
    return sum(min(1.0, (sum(given) - own) / needed) for own in given) / len(given)


def anls(said: str, golds: Sequence[str]) -> float:
    """Normalised Levenshtein similarity to the nearest text, without case; 0 from half wrong on (arXiv 1907.00490)."""
    return max(_similarity(_lower(said), _lower(gold)) for gold in golds)


def relaxed(said: str, golds: Sequence[str]) -> float:
    """ChartQA's (arXiv 2203.10244, section 5.1): a number may be off by 5 %, other texts are the same without case.
    Beyond the paper, thousands may have commas, and a point may stand at the end."""
    return max(_relaxed(_lower(said), _lower(gold)) for gold in golds)


METRICS: dict[str, Metric] = {"exact": exact, "vqa": vqa, "anls": anls, "relaxed": relaxed}


def _lower(text: str) -> str:
    return " ".join(text.lower().split())


def _plain(text: str) -> str:
    """As VQA's evaluation has it: a mark beside a blank goes, one within a word parts it, a point stays in a number."""
    text = " ".join(text.lower().split()).replace("'", "").replace("\u2019", "")
    thousands = re.search(r"\d,\d", text)
    written = text
    for mark in _MARKS:
        beside = f"{mark} " in text or f" {mark}" in text
        written = written.replace(mark, "" if thousands or beside else " ")
    words = re.sub(r"\.(?!\d)", "", written).split()
    return " ".join(_DIGITS.get(word, word) for word in words if word not in _ARTICLES)


def _similarity(one: str, other: str) -> float:
    longest = max(len(one), len(other))
    distance = _edits(one, other) / longest if longest else 0.0
    return 1 - distance if distance < _THRESHOLD else 0.0


def _relaxed(said: str, gold: str) -> float:
    one, other = _number(said), _number(gold)
    near = one is not None and other is not None and abs(one - other) <= _TOLERANCE * abs(other)
    return float(near or said == gold)


def _number(text: str) -> float | None:
    text = text.rstrip(".").replace(",", "")
    try:
        return float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None


def _edits(one: str, other: str) -> int:
    """Levenshtein's distance."""
    row = list(range(len(other) + 1))
    for number, letter in enumerate(one, 1):
        last = [number]
        for place, compared in enumerate(other):
            last.append(min(row[place] + (letter != compared), row[place + 1] + 1, last[-1] + 1))
        row = last
    return row[-1]
