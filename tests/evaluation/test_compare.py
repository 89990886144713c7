"""The comparison, end to end with tiny cells, and its arithmetic by hand."""

import json
from dataclasses import replace

import pytest
import yaml
from PIL import Image

from aki.cli import main
from aki.evaluation.compare import CellError, _plain, plan, run_comparison
from aki.evaluation.report import mean_curve, steps_to_reach, table

SKILLS = ("read", "colour", "count_colour", "count_digit", "exists", "relation")


def result(seed, accuracy, curve, **skills):
    test = dict.fromkeys(SKILLS, 0.5) | {"accuracy": accuracy} | skills
    return {"seed": seed, "test": test, "curve": [{"step": 10 * (i + 1), "accuracy": a} for i, a in enumerate(curve)]}


RESULTS = {
    "causal": [result(0, 0.60, [0.2, 0.4, 0.6]), result(1, 0.64, [0.4, 0.4, 0.6], exists=0.7)],
    "mma": [result(0, 0.70, [0.3, 0.6, 0.7]), result(1, 0.70, [0.5, 0.62, 0.8], exists=0.9, count_digit=0.6)],
}


def test_table_is_the_mean_over_seeds_and_the_difference():
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table(RESULTS).splitlines()]
    assert rows[0] == [
        "rule",
        "all",
        "read",
        "colour",
        "count colour",
        "count digit",
        "exists",
        "relation",
        "searching",
    ]
    # causal searches: seed 0 (.5 + .5) / 2, seed 1 (.5 + .7) / 2; mma: .5 and (.6 + .9) / 2.
    assert rows[2] == ["causal", "62.0", "50.0", "50.0", "50.0", "50.0", "60.0", "50.0", "55.0"]
    assert rows[3] == ["mma", "70.0", "50.0", "50.0", "50.0", "55.0", "70.0", "50.0", "62.5"]
    assert rows[4] == ["mma - causal", "+8.0", "+0.0", "+0.0", "+0.0", "+5.0", "+10.0", "+0.0", "+7.5"]


def test_steps_to_reach_causals_end():
    assert mean_curve(RESULTS["mma"]) == [(10, pytest.approx(40)), (20, pytest.approx(61)), (30, pytest.approx(75))]
    assert steps_to_reach(RESULTS, "mma") == (20, 30)
    assert steps_to_reach({"causal": RESULTS["mma"], "mma": RESULTS["causal"]}, "mma") == (None, 30)


def test_plan_shares_the_pretraining_of_a_seed(tiny_recipe):
    first, second = plan(tiny_recipe, ["causal", "mma"], 2)
    assert [cell.name for cell in first] == ["pretrain", "pretrain-seed1"]
    assert [(cell.name, cell.start_from, cell.seed) for cell in second] == [
        ("causal", "pretrain", 0),
        ("mma", "pretrain", 0),
        ("causal-seed1", "pretrain-seed1", 1),
        ("mma-seed1", "pretrain-seed1", 1),
    ]


def test_compare_from_the_command_line_and_again(tiny_recipe, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(_plain(tiny_recipe)))
    arguments = ["compare", str(recipe), "--output", str(tmp_path / "out")]
    main(arguments)
    said = capsys.readouterr().out
    assert "| mma - causal |" in said
    assert said.count("?  ") + said.count(".  ") >= 3, "three questions are answered"
    assert Image.open(tmp_path / "out/curves.png").size[0] > 500
    assert Image.open(tmp_path / "out/scene.png").size == (240, 240)
    causal, mma = (json.loads((tmp_path / "out" / rule / "result.json").read_text()) for rule in ("causal", "mma"))
    assert causal["recipe"]["sft"].pop("rule") == "causal"
    assert mma["recipe"]["sft"].pop("rule") == "mma"
    assert causal["recipe"] == mma["recipe"]
    assert causal["parameters"] == mma["parameters"]
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.safetensors")}
    assert len(written) >= 3
    main(arguments)
    assert {path: path.stat().st_mtime_ns for path in written} == written, "nothing is trained twice"


def test_a_cell_that_fails_is_named_with_its_reason(tiny_recipe, tmp_path):
    tiny_recipe.sft = replace(tiny_recipe.sft, max_length=8)
    with pytest.raises(
        CellError, match=r"the cell causal failed: aki: sample digits/.* has .* tokens, more than the 8"
    ):
        run_comparison(tiny_recipe, tmp_path, ["causal"], 1, 1)
