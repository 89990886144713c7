"""What a user can find out about recipes: the fields, their page, and recipes to start from."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from aki.cli import main
from aki.commands.shared import as_flags, read_recipe
from aki.training.recipe import Recipe, load_recipe
from aki.training.recipe.describe import fields_of, page
from aki.training.recipe.starters import STARTERS, starter

ROOT = Path(__file__).parents[2]


def test_the_page_is_up_to_date():
    assert (ROOT / "docs/recipe.md").read_text() == page(), "aki recipe fields --markdown > docs/recipe.md"


def test_every_field_is_listed_with_its_meaning(capsys):
    main(["recipe", "fields"])
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert {field.name for field in dataclasses.fields(Recipe)} <= lines.keys()
    assert re.search(r"int +required +samples a step on each device", lines["sft.batch_size"])
    assert re.search(r"float +0\.01 +AdamW's", lines["pretrain.weight_decay"])
    assert re.search(r"float +0\.0001 +AdamW's", lines["sft.weight_decay"])
    assert "sft.sources[].augment.flip" in lines
    assert all(one.meaning for one in fields_of())


@pytest.mark.parametrize("purpose", STARTERS)
def test_a_starter_loads_and_shows_true_defaults(tmp_path, purpose, capsys):
    file = tmp_path / "mine.yaml"
    main(["recipe", "init", str(file), "--for", purpose])
    assert f"aki data check {file}" in capsys.readouterr().out
    text = file.read_text()
    recipe = load_recipe(file)
    shown = re.sub(r"^( *(?:- )?)# (\w+: .+?)(  #.*)?$", r"\1\2", text, flags=re.MULTILINE)
    file.write_text("\n".join(line for line in shown.splitlines() if not line.lstrip().startswith("#")))
    assert load_recipe(file) == recipe, "with every default said"
    written = yaml.safe_load(file.read_text())
    assert written.keys() == {field.name for field in dataclasses.fields(Recipe)}
    assert max(map(len, text.splitlines())) <= 120


def test_a_starter_writes_over_nothing(tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    file.write_text("mine")
    with pytest.raises(SystemExit):
        main(["recipe", "init", str(file)])
    assert "is there already: name another file" in capsys.readouterr().err
    assert file.read_text() == "mine"


def test_pretraining_can_be_planned_as_it_is(tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    file.write_text(starter("pretrain"))
    main(["train", str(file), "--dry-run"])
    assert "steps: 50,000 of 8 samples" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("said", "packing"),
    [
        (["--sft.packing"], True),
        (["--sft.packing", "True"], True),
        (["--sft.packing=true"], True),
        (["--sft.no-packing"], False),
        (["--sft.packing", "False"], False),
        (["--sft.packing", "--seed", "3"], True),
    ],
)
def test_a_switch_may_be_said_in_words(said, packing):
    recipe = read_recipe("digits", said)
    assert recipe.sft.packing is packing
    assert recipe.seed == (3 if "3" in said else 0)


def test_words_are_left_alone_where_there_is_no_switch():
    said = ["--name", "True", "--sft.also_causal", "false", "--bf16", "TRUE"]
    assert as_flags(said) == ["--name", "True", "--sft.no-also-causal", "--bf16"]
