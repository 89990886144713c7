"""Which tokens make which word of a text."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+|[^\w\s]")
"""Letters and digits that stand together, or one mark. Chinese and Japanese have no spaces: a character is a word."""


@dataclass(frozen=True)
class Word:
    """
    Attributes:
        positions: of its tokens in the sequence; a token that reaches into two words belongs to both.
    """

    text: str
    positions: tuple[int, ...]


def words_of(tokenizer: Any, ids: list[int], positions: list[int], within: str | None = None) -> list[Word]:
    """The words that these tokens make, in order.

    Args:
        ids: tokens of text, special ones may be among them; these are in no word.
        positions: of each token in the sequence.
        within: only the words of the last place where this text stands. Where the tokenizer changes text so that it is
            not found, all words.
    """
    special = set(tokenizer.all_special_ids)
    kept = [(token, position) for token, position in zip(ids, positions, strict=True) if token not in special]
    kept_ids = [token for token, _ in kept]
    ends = [len(_decode(tokenizer, kept_ids[: i + 1])) for i in range(len(kept_ids))]
    text = _decode(tokenizer, kept_ids)
    first = text.rfind(within.strip()) if within else -1
    stop = first + len(within.strip()) if within and first >= 0 else len(text)
    words = []
    for found in _WORD.finditer(text, max(first, 0), stop):
        own = [
            position
            for (_, position), start, end in zip(kept, [0, *ends[:-1]], ends, strict=True)
            # A token that ends a character of several tokens adds nothing to the length.
            if min(start, end - 1) < found.end() and end > found.start()
        ]
        words.append(Word(found.group(), tuple(own)))
    return words


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)
