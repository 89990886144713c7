"""What a recipe may hold, out of its dataclasses and their docstrings: the list of its fields, and their page."""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from aki.training.recipe.run import Recipe
from aki.training.recipe.stage import PretrainRecipe, StageRecipe

REQUIRED = "required"


@dataclass(frozen=True)
class Described:
    """One field of a recipe.

    Attributes:
        name: dotted, as on the command line; `[]` stands for each of a list.
        kind: its type, as YAML has it.
        default: as YAML writes it, or REQUIRED.
        part: the dataclass of a group of fields (a stage, the sources); None is a plain value.
    """

    name: str
    kind: str
    default: str
    meaning: str
    part: type | None = None


def described(kind: type, where: str = "") -> list[Described]:
    """The fields of one dataclass, in its order."""
    said, hints = meanings(kind), typing.get_type_hints(kind)
    return [
        Described(
            f"{where}.{one.name}" if where else one.name,
            _type(hints[one.name]),
            _default(one),
            said[one.name],
            _part(hints[one.name]),
        )
        for one in dataclasses.fields(kind)
    ]


def fields_of(kind: type = Recipe, where: str = "") -> Iterator[Described]:
    """Every field of a dataclass, each group followed by its own."""
    for one in described(kind, where):
        yield one
        if one.part is not None:
            yield from fields_of(one.part, one.name + ("[]" if one.kind.startswith("list") else ""))


def meanings(kind: type) -> dict[str, str]:
    """Field -> what the docstring's Attributes (its own, else that of the class it is made from) say of it, a line."""
    found: dict[str, str] = {}
    for one in reversed(kind.__mro__):
        _, _, attributes = inspect.cleandoc(vars(one).get("__doc__") or "").partition("Attributes:\n")
        for name, text in re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", attributes, re.MULTILINE):
            found[name] = " ".join(text.split())
    return found


def table() -> str:
    """All fields for a terminal."""
    rows = [(one.name, one.kind, one.default, one.meaning) for one in fields_of()]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)) + f"  {row[3]}" for row in rows
    )


_HEAD = """\
# What a recipe may hold

*Made by `aki recipe fields --markdown > docs/recipe.md`; do not edit.*

`aki recipe init FILE --for lora` (or `sft`, `compare`, `pretrain`) writes a recipe with these fields in it, to be
filled in. Each can be set on the command line too, as `--sft.steps 100`.
"""


def page() -> str:
    """All fields in Markdown, a table a group. Of pre-training those that SFT has in another way."""
    lines = [_HEAD.rstrip()]
    for kind, names in _groups(Recipe, "").items():
        title = ", ".join(f"`{name}`" for name in names) or "The recipe"
        shared = described(StageRecipe) if kind is PretrainRecipe else []
        lines += ["", f"## {title}", "", _summary(kind), "", "| field | type | default | meaning |"]
        lines += ["| --- | --- | --- | --- |"]
        lines += [
            f"| `{one.name}` | {one.kind} | {one.default} | {one.meaning} |"
            for one in described(kind)
            if one not in shared
        ]
    return "\n".join(lines) + "\n"


def _groups(kind: type, where: str) -> dict[type, list[str]]:
    """The dataclasses of a recipe, and under which names each stands in it."""
    groups: dict[type, list[str]] = {kind: [where] if where else []}
    for one in described(kind, where):
        if one.part is not None:
            below = one.name + ("[]" if one.kind.startswith("list") else "")
            for part, names in _groups(one.part, below).items():
                groups.setdefault(part, []).extend(names)
    return groups


def _summary(kind: type) -> str:
    return " ".join(inspect.cleandoc(kind.__doc__ or "").partition("\n\n")[0].split())


def _part(hint: Any) -> type | None:
    """The dataclass in a type, whether it is optional or one of many."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return hint
    return next((part for inner in typing.get_args(hint) if (part := _part(inner)) is not None), None)


def _type(hint: Any) -> str:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _type(next(one for one in inner if one is not type(None)))
    if origin is tuple:
        return f"list of {_type(inner[0])}"
    if origin is dict or dataclasses.is_dataclass(hint):
        return "mapping"
    return hint.__name__


def _default(one: dataclasses.Field) -> str:
    if one.default is not dataclasses.MISSING:
        return as_yaml(one.default)
    if one.default_factory is dataclasses.MISSING:
        return REQUIRED
    made = one.default_factory()
    return "{}" if dataclasses.is_dataclass(made) else as_yaml(made)


def as_yaml(value: Any) -> str:
    """A plain value in one line of YAML."""
    import yaml

    if isinstance(value, tuple):
        value = list(value)
    written = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), allow_unicode=True)
    return written.removesuffix("\n").removesuffix("\n...")
