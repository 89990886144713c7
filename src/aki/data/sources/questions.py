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
_MODALS = frozenset(("can", "could", "will", "would", "shall", "should", "may", "might", "must"))
_DUTIES = frozenset(("shall", "should", "may", "might", "must"))
"""What a "not" after them denies is the verb behind them: "must not" isn't the opposite of "must"."""
_ARTICLES = frozenset(("the", "a", "an"))
_RELATIVE = frozenset(("that", "which", "who"))
_SUBORDINATE = _RELATIVE | {"where", "when", "while", "what", "whose", "whom", "because", "if", "as", "than", "how"}
_JOINED = frozenset(("and", "but", "or"))
_DENIALS = frozenset(("no", "never", "nothing", "nobody", "none", "neither", "nor"))
_BE = frozenset(("is", "are", "was", "were"))
_PERFECT = frozenset(("been", "got", "gone", "fallen", "become"))
_PARTICIPLE = re.compile(r"\w*[aeiouy]\w*ed", re.IGNORECASE)
_LOWERED = re.compile(
    "the|a|an|this|that|these|those|there|it|its|he|she|they|his|her|their|my|your|our|we|you|some|all|both|each|every|"
    "one|two|three|four|five|no|most|many|several|another|everything|something|someone|nothing|nobody|none|what",
    re.IGNORECASE,
)
_CONTRACTED = (
    (re.compile(r"\b(can)(?:not|'t)\b", re.I), r"\1 not"),
    (re.compile(r"\b(wo) ?n't\b", re.I), "will not"),
    (re.compile(rf"\b({_AUXILIARIES.pattern}) ?n't\b", re.I), r"\1 not"),
    (re.compile(r"\b(it|that|there|he|she)'s\b", re.I), r"\1 is"),
    (re.compile(r"\b(they|we|you)'re\b", re.I), r"\1 are"),
)


def yes_no_question(statement: str) -> tuple[str, bool]:
    """A statement as a question, "The cat is on the mat." -> "Is the cat on the mat?".

    The verb that is moved is the statement's own: a whole word, and not the one of a clause with that, which or who. A
    "not" after it is left out, because yes to a question with a "not" may mean either; the answer is then the opposite.
    What cannot be turned safely, or denies in another way, is asked as "Is it true that ...?".

    Returns:
        The question, and whether its answer is the opposite of whether the statement is true.
    """
    text = " ".join(statement.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'").split())
    if text.endswith("?") and _AUXILIARIES.fullmatch(text.split(" ")[0]):
        return text, False
    text = text.strip('"').rstrip('.!?;:,"\N{IDEOGRAPHIC FULL STOP} ')
    for pattern, written_out in _CONTRACTED:
        text = pattern.sub(written_out, text)
    words = text.split(" ")
    verb = None if ". " in text else _main_verb(words)
    turned = None if verb is None else _turned(words[:verb], words[verb].lower(), words[verb + 1 :])
    return turned or (f"Is it true that {_lowered(text)}?", False)


def _main_verb(words: list[str]) -> int | None:
    """Where the verb stands that the subject goes with; a verb after "that" is the clause's, and one is passed over."""
    clauses = 0
    for place in range(1, len(words)):
        word = words[place].lower()
        if (_AUXILIARIES.fullmatch(word) or word in _VERBS) and not _is_noun(words, place):
            if clauses == 0:
                return place
            clauses -= 1
        elif word in _RELATIVE and not _AUXILIARIES.fullmatch(words[place - 1]):
            clauses += 1
    return None


def _is_noun(words: list[str], place: int) -> bool:
    """Whether what could be a verb is a thing: the can, the trash can faces the wall, the bed covers are red."""
    following = words[place + 1].lower() if place + 1 < len(words) else ""
    return (
        words[place - 1].lower() in _ARTICLES
        or _FINITE.fullmatch(following) is not None
        or (words[place].lower() in _MODALS and following in _VERBS)
    )


def _turned(subject: list[str], verb: str, rest: list[str]) -> tuple[str, bool] | None:
    """The question and whether its answer is the opposite; None where moving the verb would not give that question."""
    lower = [word.lower().strip(",") for word in rest]
    own = next((place for place, word in enumerate(lower) if word in _SUBORDINATE), len(lower))
    if _BE & set(lower[:own]):
        return None  # a second statement, or the verb was one of a clause
    if _DENIALS & {*lower, *(word.lower() for word in subject)}:
        return None
    negated = lower[:1] == ["not"] and lower[1:2] != ["only"]
    if negated and (verb in _DUTIES or _JOINED & set(lower)):
        return None
    rest = rest[1:] if negated else rest
    if verb in _VERBS:
        verb, rest = "does", [_VERBS[verb], *rest]
    elif verb in _HAVE and not (rest and rest[0].lower() in _PERFECT):
        if rest and _PARTICIPLE.fullmatch(rest[0]):
            return None  # "has painted walls" and "has painted the walls" are asked in different ways
        verb, rest = {"has": "does", "have": "do", "had": "did"}[verb], ["have", *rest]
    return " ".join([verb.capitalize(), _lowered(" ".join(subject)), *rest]) + "?", negated


def _lowered(text: str) -> str:
    first, space, rest = text.partition(" ")
    return (first.lower() if _LOWERED.fullmatch(first) else first) + space + rest
