"""Statements in English turned into yes/no questions, for VSR's captions."""

from __future__ import annotations

import re

_AUXILIARIES = re.compile(
    "is|are|was|were|am|has|have|had|can|could|will|would|shall|should|may|might|must|does|do|did", re.IGNORECASE
)
_FINITE = re.compile(_AUXILIARIES.pattern.replace("|have", "").replace("|does|do", "|does"), re.IGNORECASE)
"""Those that no other can stand before: "the can is" has a can, "it can have" has not."""
_HAVE = frozenset(("has", "have", "had"))
_VERBS = {
    "contains": "contain",
    "consists": "consist",
    "touches": "touch",
    "faces": "face",
    "surrounds": "surround",
    "covers": "cover",
    "includes": "include",
    "holds": "hold",
    "carries": "carry",
    "supports": "support",
    "sits": "sit",
    "stands": "stand",
    "lies": "lie",
    "hangs": "hang",
    "leans": "lean",
    "rests": "rest",
    "overlaps": "overlap",
    "belongs": "belong",
    "looks": "look",
    "points": "point",
}
"""Other verbs, in the third person, and what they are after "does"."""
_RELATIVE = frozenset(("that", "which", "who"))
_LOWERED = re.compile(
    "the|a|an|this|that|these|those|there|it|its|he|she|they|his|her|their|my|your|our|we|you|some|all|both|each|every|"
    "one|two|three|four|five|no|most|many|several|another",
    re.IGNORECASE,
)
_CONTRACTED = (
    (re.compile(r"\b(can)(?:not|'t)\b", re.I), r"\1 not"),
    (re.compile(r"\b(wo)n't\b", re.I), "will not"),
    (re.compile(r"\b(\w+)n't\b", re.I), r"\1 not"),
    (re.compile(r"\b(it|that|there|he|she)'s\b", re.I), r"\1 is"),
    (re.compile(r"\b(they|we|you)'re\b", re.I), r"\1 are"),
)


def yes_no_question(statement: str) -> tuple[str, bool]:
    """A statement as a question, "The cat is on the mat." -> "Is the cat on the mat?".

    The verb that is moved is the statement's own: a whole word, and not the one of a clause with that, which or who. A
    "not" after it is left out, because yes to a question with a "not" may mean either; the answer is then the opposite.

    Returns:
        The question, and whether its answer is the opposite of whether the statement is true.
    """
    text = " ".join(statement.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'").split())
    if text.endswith("?"):
        return text, False
    text = text.rstrip(".! ")
    for pattern, written_out in _CONTRACTED:
        text = pattern.sub(written_out, text)
    words = text.split(" ")
    verb = None if ". " in text else _main_verb(words)
    if verb is None:
        return f"Is it true that {_lowered(text)}?", False
    subject, rest = words[:verb], words[verb + 1 :]
    negated = rest[:1] == ["not"] and rest[1:2] != ["only"]
    rest = rest[1:] if negated else rest
    first, rest = _asked(words[verb].lower(), rest, negated)
    return " ".join([first.capitalize(), _lowered(" ".join(subject)), *rest]) + "?", negated


def _main_verb(words: list[str]) -> int | None:
    """Where the verb stands that the subject goes with; a verb after "that" is the clause's, and one is passed over."""
    clauses = 0
    for place in range(1, len(words)):
        word = words[place].lower()
        noun = place + 1 < len(words) and _FINITE.fullmatch(words[place + 1])
        if not noun and (_AUXILIARIES.fullmatch(word) or word in _VERBS):
            if clauses == 0:
                return place
            clauses -= 1
        elif word in _RELATIVE and not _AUXILIARIES.fullmatch(words[place - 1]):
            clauses += 1
    return None


def _asked(verb: str, rest: list[str], negated: bool) -> tuple[str, list[str]]:
    """The word that a question begins with, and what follows its subject."""
    if verb in _VERBS:
        return "does", [_VERBS[verb], *rest]
    perfect = rest[:1] and (rest[0] in ("been", "got", "gone", "fallen", "become") or rest[0].endswith("ed"))
    if verb in _HAVE and not perfect:
        return {"has": "does", "have": "do", "had": "did"}[verb], ["have", *rest]
    return verb, rest


def _lowered(text: str) -> str:
    first, space, rest = text.partition(" ")
    return (first.lower() if _LOWERED.fullmatch(first) else first) + space + rest
