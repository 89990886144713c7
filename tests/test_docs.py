"""Every `aki ...` that a page shows is a command that there is, with options that it has."""

import contextlib
import io
import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from aki.cli import main
from aki.training.recipe import Recipe
from aki.training.recipe.describe import fields_of

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
GROUPS = ("data", "recipe")
BLOCK = re.compile(r"```(?:sh|bash|console)\n(.*?)```", re.DOTALL)
INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
COMMAND = re.compile(r"(?:^|\s|/)(?:-m )?aki ((?:[a-z]+)(?:\s.*)?)$")


def commands(page: Path) -> list[list[str]]:
    text = page.read_text()
    blocks = BLOCK.findall(text)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    inline = [" ".join(code.split()) for code in INLINE.findall(re.sub(r"```.*?```", "", text, flags=re.DOTALL))]
    found = []
    for line in [*lines, *(code for code in inline if code.startswith("aki "))]:
        match = COMMAND.search(line.split(" #")[0].strip())
        if match:
            found.append(shlex.split(match[1].split(" | ")[0].split("; ")[0]))
    return found


@cache
def help_of(command: tuple[str, ...]) -> str:
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), pytest.raises(SystemExit) as end:
        main([*command, "--help"])
    assert end.value.code == 0
    return shown.getvalue()


RECIPE_FIELDS = {one.name.split("[")[0].replace("_", "-") for one in fields_of(Recipe)}
MAPPINGS = tuple(
    f"{name}."
    for name in (one.name.replace("_", "-") for one in fields_of(Recipe) if one.kind == "mapping")
    if not any(other.startswith(f"{name}.") for other in RECIPE_FIELDS)
)
"""Fields that take any names."""


def unknown(command: list[str]) -> list[str]:
    length = 2 if command[0] in GROUPS and len(command) > 1 and command[1].isalpha() and command[1].islower() else 1
    listed = help_of(tuple(command[: length - 1]))
    assert f" {command[length - 1]} " in listed, f"there is no command aki {' '.join(command[:length])}"
    text = help_of(tuple(command[:length]))
    options = [word.split("=")[0] for word in command[length:] if word.startswith("--")]
    takes_recipe = command[0] in ("train", "compare", "data")
    return [
        option
        for option in options
        if not re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", text)
        and not (takes_recipe and _is_field(option.removeprefix("--").replace("_", "-")))
    ]


def _is_field(name: str) -> bool:
    return name in RECIPE_FIELDS or name.startswith(MAPPINGS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_of_a_page(page):
    gone = {f"aki {' '.join(command)}": missing for command in commands(page) if (missing := unknown(command))}
    assert not gone


def test_commands_are_found():
    assert sum(map(len, map(commands, PAGES))) > 50


def test_what_is_gone_is_noticed():
    assert unknown(["train", "digits", "--sft.rules", "mma"]) == ["--sft.rules"]
    assert unknown(["train", "digits", "--sft.rule", "mma", "--resume"]) == []
    with pytest.raises(AssertionError, match="no command"):
        unknown(["teach", "digits"])
