"""docs/models.md says what comes of training each family's tiny model."""

import importlib.util
from pathlib import Path

import pytest
from abilities import ABILITIES, EVERY_FAMILY, TITLES

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def made():
    spec = importlib.util.spec_from_file_location("models_table", DOCS / "models_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_has_every_family_and_ability(made):
    assert TITLES.keys() == EVERY_FAMILY.keys()
    table = made.PAGE.read_text().split(made.BEGIN)[1].split(made.END)[0].strip().splitlines()
    head, _, *rows = [line.strip("| ").split(" | ") for line in table if line.startswith("|")]
    assert head == ["family", *ABILITIES], "run docs/models_table.py"
    assert [row[0] for row in rows] == list(TITLES.values()), "run docs/models_table.py"


# Those in which something is refused, or that say most; each is a handful of training runs.
QUICK = ("gemma3", "qwen2_audio")


@pytest.mark.parametrize("family", [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in TITLES])
def test_a_line_is_what_training_says(family, made):
    found = made.outcomes(family)
    page = made.PAGE.read_text()
    for line in [made.row(family, found), *made.refusals(family, found)]:
        assert line in page, "run docs/models_table.py"
