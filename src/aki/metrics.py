"""How an answer is scored against the right one, by name: 0 to 1."""

from __future__ import annotations

import re
from collections.abc import Callable

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)}
_ARTICLES = {"a", "an", "the"}
_THRESHOLD = 0.5
"""ANLS: more than half of the characters wrong is no answer (arXiv 1907.00490, eq. 1)."""
_TOLERANCE = 0.05
"""Relaxed accuracy: of a number, arXiv 2203.10244, section 5.1."""


def exact(said: str, right: str) -> float:
    """Whether they are the same text, but for blanks around it."""
    return float(said.strip() == right.strip())


def vqa(said: str, right: str) -> float:
    """VQA's accuracy (arXiv 1505.00468, section 3.3) of a question with one answer: whether they are the same without
    case, articles, punctuation and apostrophes, with numbers up to ten as digits."""
    return float(_plain(said) == _plain(right))


def anls(said: str, right: str) -> float:
    """Normalised Levenshtein similarity of the texts without case; 0 below a half (arXiv 1907.00490, eq. 1)."""
    one, other = (" ".join(text.lower().split()) for text in (said, right))
    longest = max(len(one), len(other))
    distance = _edits(one, other) / longest if longest else 0.0
    return 1 - distance if distance < _THRESHOLD else 0.0


def relaxed(said: str, right: str) -> float:
    """ChartQA's (arXiv 2203.10244, section 5.1): a number may be off by 5 %, other texts are the same without case."""
    one, other = _number(said), _number(right)
    if one is not None and other is not None:
        return float(abs(one - other) <= _TOLERANCE * abs(other))
    return float(said.strip().lower() == right.strip().lower())


METRICS: dict[str, Callable[[str, str], float]] = {"exact": exact, "vqa": vqa, "anls": anls, "relaxed": relaxed}


def _plain(text: str) -> str:
    text = re.sub(r"(?<=\d),(?=\d)", "", text.lower().replace("'", "").replace("\u2019", ""))
    # A point stays within a number.
    words = re.sub(r"(?!(?<=\d)\.(?=\d))[^\w\s]", " ", text).split()
    return " ".join(_DIGITS.get(word, word) for word in words if word not in _ARTICLES)


def _number(text: str) -> float | None:
    text = text.strip().rstrip(".").replace(",", "")
    percent = text.endswith("%")
    try:
        return float(text.rstrip("%")) / (100 if percent else 1)
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
