"""What is wrong with a recipe, in a sentence."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any


class RecipeError(ValueError):
    """A recipe that cannot be used as it stands."""


def known(kind: str, name: str, names: Iterable[str], where: str) -> str:
    """The name, if it is among those.

    Raises:
        RecipeError: it is not; the nearest is named.
    """
    names = list(names)
    if name not in names:
        near = get_close_matches(name, names, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise RecipeError(f"unknown {kind} {name!r} in {where}.{hint}")
    return name


def one_of(name: str, value: str, known: tuple[str, ...]) -> str:
    if value not in known:
        raise RecipeError(f"{name} {value!r} is not known; there are {', '.join(known)}.")
    return value


def missing_key(where: str, key: str, hint: str = "") -> str:
    return f"the key {join_key(where, key)!r} is missing{': ' if hint else ''}{hint}."


def join_key(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)
