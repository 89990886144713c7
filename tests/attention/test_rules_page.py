"""The table of docs/rules.md is what the guard says, and its picture is there."""

import runpy
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def made() -> dict:
    return runpy.run_path(str(DOCS / "rules_table.py"))


def test_the_page_holds_the_guards_verdicts(made):
    page = (DOCS / "rules.md").read_text()
    assert f"{made['BEGIN']}\n{made['table']()}\n{made['END']}" in page, "run docs/rules_table.py"
    assert (DOCS / "rules.png").exists()


def test_the_verdicts_that_the_paper_names(made):
    """Section 1: opened in pre-training, the mask leaks or opens nothing; in SFT it is MMA's."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in made["table"]().splitlines()]
    said = {row[0].strip("`"): dict(zip(rows[0], row, strict=True)) for row in rows[2:]}
    assert said["mma"]["pre-training: captions"] == "no: opens nothing"
    assert said["mma"]["SFT: questions"] == "yes: the picture to the text"
    assert said["mma"][made["WRONG"]] == said["prefix"][made["WRONG"]] == "**no: leaks**"
    assert said["causal"]["pre-training: captions"] == said["causal"]["SFT: questions"] == "yes, as causal"
