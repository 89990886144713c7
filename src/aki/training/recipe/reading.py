"""A recipe out of YAML and back."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from aki import recipes
from aki.training.recipe.errors import RecipeError, join_key, missing_key
from aki.training.recipe.run import Recipe


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe.

    Args:
        path: a YAML file, or the name of one of aki's own recipes.

    Raises:
        RecipeError: no such file, or not YAML; or unknown keys (with the nearest ones), missing ones and wrong types,
            all of them at once.
    """
    path = recipes.path_of(path)
    try:
        values = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise RecipeError(f"there is no recipe at {path}, and aki's own are {', '.join(recipes.names())}.") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not YAML: {error}") from error
    try:
        return build(Recipe, values, "")
    except ValueError as error:
        told = str(error).splitlines()
        several = "" if len(told) == 1 else f"{len(told)} things are wrong:\n  "
        raise RecipeError(f"{path}: {several}" + "\n  ".join(told)) from error


def beyond_defaults(value: Any) -> Any:
    """A dataclass as plain values for JSON or YAML, without the fields that are as they are by default (`recorded` ones
    stay)."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        defaults = {f.name: f.default for f in dataclasses.fields(value)}
        defaults |= {f.name: f.default_factory() for f in dataclasses.fields(value) if callable(f.default_factory)}
        for one in dataclasses.fields(value):
            if one.metadata.get("recorded"):
                defaults[one.name] = dataclasses.MISSING
        held = {name: getattr(value, name) for name in defaults}
        return {name: beyond_defaults(one) for name, one in held.items() if one != defaults[name]}
    if isinstance(value, dict):
        return {name: beyond_defaults(one) for name, one in value.items()}
    return [beyond_defaults(one) for one in value] if isinstance(value, list | tuple) else value


def build(kind: Any, value: Any, where: str) -> Any:
    """A value read from YAML as the annotated type.

    Args:
        where: the dotted name of the field, for messages.
    """
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _build_dataclass(kind, value, where)
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in inner:
            return None
        return build(next(option for option in inner if option is not type(None)), value, where)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_build_all((i, inner[0], item, f"{where}[{i}]") for i, item in enumerate(value)).values())
    if origin is tuple and inner[0] is str and isinstance(value, str):
        return (value,)
    if origin is dict and isinstance(value, dict):
        return value
    # YAML reads 1e-3 as text.
    if kind is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    if isinstance(kind, type) and isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise RecipeError(f"{where} should be {getattr(kind, '__name__', kind)}, it is {value!r}.")


def _build_dataclass(kind: type, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise RecipeError(f"{where or 'a recipe'} should be a mapping of fields, it is {value!r}.")
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    wrong = []
    for key in (key for key in value if key not in fields):
        near = get_close_matches(str(key), fields, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(fields)}."
        wrong.append(f"unknown key {join_key(where, key)!r}: {hint}")
    for name, spec in fields.items():
        if name not in value and spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
            wrong.append(missing_key(where, name))
    needs: Callable[[Any], dict[str, str]] = getattr(kind, "needs", lambda values: {})
    wrong += [missing_key(where, name, hint) for name, hint in needs(value).items()]
    known = ((key, hints[key], item, join_key(where, key)) for key, item in value.items() if key in fields)
    return kind(**_build_all(known, wrong))


def _build_all(parts: Iterable[tuple[Any, Any, Any, str]], wrong: Sequence[str] = ()) -> dict[Any, Any]:
    """What is built of (key, kind, value, where), by key.

    Args:
        wrong: what is already known to be.

    Raises:
        RecipeError: something is wrong; all of it is said, a line each.
    """
    built, wrong = {}, list(wrong)
    for key, kind, value, where in parts:
        try:
            built[key] = build(kind, value, where)
        except ValueError as error:
            wrong.append(str(error))
    if wrong:
        raise RecipeError("\n".join(wrong))
    return built
