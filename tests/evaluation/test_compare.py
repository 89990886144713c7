"""The comparison, end to end with tiny cells, and its arithmetic by hand."""

import json
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from fixtures.make import write_sources
from fixtures.make_shards import write_shards
from PIL import Image

from aki.cli import main
from aki.evaluation import compare
from aki.evaluation.cells import CellError, _train
from aki.evaluation.compare import Comparison, run_comparison
from aki.evaluation.plan import check, fast, plan, rows_by_rule
from aki.evaluation.report import (
    interval,
    mean_curve,
    paired,
    remarks,
    report_parts,
    seeds_table,
    steps_to_reach,
    summary_table,
    table,
)
from aki.training.recipe import Recipe, RecipeError, beyond_defaults, build, load_recipe

SKILLS = ("read", "colour", "count_colour", "count_digit", "exists", "relation")


@pytest.fixture(autouse=True)
def _few_rounds(monkeypatch):
    monkeypatch.setattr("aki.evaluation.steps.ROUNDS", 2)


def result(seed, accuracy, curve, **skills):
    test = dict.fromkeys(SKILLS, 0.5) | {"accuracy": accuracy} | skills
    return {"seed": seed, "test": test, "curve": [{"step": 10 * (i + 1), "accuracy": a} for i, a in enumerate(curve)]}


VQA = [{"kind": "vqav2", "annotations": "a"}]

RESULTS = {
    "causal": [result(0, 0.60, [0.2, 0.4, 0.6]), result(1, 0.64, [0.4, 0.4, 0.6], exists=0.7)],
    "mma": [result(0, 0.70, [0.3, 0.6, 0.7]), result(1, 0.70, [0.5, 0.62, 0.8], exists=0.9, count_digit=0.6)],
}


def comparison_of(recipe, results, **rows):
    recipe.rows = {row: rows.get(row, {}) for row in results}
    return Comparison(recipe, results)


def cells_of(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]


def test_table_is_the_mean_over_seeds_and_the_difference(tiny_recipe):
    rows = cells_of(table(comparison_of(tiny_recipe, RESULTS)))
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


def test_skills_are_those_that_were_measured(tiny_recipe):
    runs = {
        row: [{"seed": 0, "test": {"accuracy": 0.5, "vqav2": 0.25, "gqa": 0.75}, "curve": []}]
        for row in ("causal", "mma")
    }
    rows = cells_of(table(comparison_of(tiny_recipe, runs)))
    assert rows[0] == ["rule", "all", "vqav2", "gqa"]
    assert rows[2] == ["causal", "50.0", "25.0", "75.0"]
    assert seeds_table(runs).splitlines()[0] == "| rule | seed 0: all |"
    assert seeds_table(RESULTS).splitlines()[0] == "| rule | seed 0: all / searching | seed 1: all / searching |"


def test_steps_to_reach_causals_end():
    assert mean_curve(RESULTS["mma"]) == [(10, pytest.approx(40)), (20, pytest.approx(61)), (30, pytest.approx(75))]
    assert steps_to_reach(RESULTS, "mma", "causal") == (20, 30)
    assert steps_to_reach({"causal": RESULTS["mma"], "mma": RESULTS["causal"]}, "mma", "causal") == (None, 30)


def with_costs(results):
    for row, runs in results.items():
        for run in runs:
            tokens = 4e6 if row == "mma" else 2e6
            run |= {"tokens": tokens, "flops": 6 * tokens * 1e6, "parameters": 1_234_567}
            run["pretrain"] = {"tokens": 1e6, "flops": 6e12}
    return results


def test_intervals_are_students():
    # Textbook: n = 5, standard deviation 1, t = 2.776.
    mean, half = interval([1, 2, 3, 4, 5])
    assert (mean, half) == (3, pytest.approx(2.776 * 2.5**0.5 / 5**0.5, abs=1e-3))
    assert interval([4.0]) == (4.0, None)


def test_summary_compares_the_seeds_that_both_have(tiny_recipe):
    results = with_costs({"causal": RESULTS["causal"], "mma": [*RESULTS["mma"], result(2, 0.1, [0.1])]})
    assert paired(results, "mma", "causal") == [pytest.approx(10), pytest.approx(6)]
    steps = {"base": "causal", "rows": {"causal": {"ratio": 1.0}, "mma": {"ratio": 1.5}}}
    comparison = comparison_of(tiny_recipe, results, causal={"title": "Causal"}, mma={"title": "MMA"})
    cells = cells_of(summary_table(replace(comparison, steps=steps)))
    # causal 60 and 64: 12.706 * 2.828 / sqrt(2) = 25.4; differences 10 and 6 likewise.
    assert cells[2] == ["Causal", "2", "62.0 ± 25.4", "", "1,234,567", "3.00", "18.0", "1.00"]
    assert cells[3] == ["MMA", "3", "50.0 ± 86.1", "+8.0 ± 25.4", "1,234,567", "5.00", "30.0", "1.50"]
    assert cells_of(summary_table(comparison))[3][-1] == ""


def test_a_row_is_compared_with_what_it_says(tiny_recipe):
    results = with_costs({"long": RESULTS["causal"], "long-mma": RESULTS["mma"], "causal": RESULTS["mma"]})
    rows = {"long": {"against": None}, "long-mma": {"against": "long"}}
    comparison = comparison_of(tiny_recipe, results, **rows)
    check(tiny_recipe)
    summary = cells_of(summary_table(comparison))
    assert [row[3] for row in summary[2:]] == ["", "+8.0 ± 25.4", ""]
    assert [row[0] for row in cells_of(table(comparison))][5:] == ["long-mma - long"]
    said = "\n".join(report_parts(comparison))
    assert "to causal on the same seeds; of long-mma to long." in said
    assert "long-mma reaches long's final accuracy at step 20 of 30" in said
    assert "long reaches" not in said


def test_a_row_is_not_compared_with_one_that_is_not_there(tiny_recipe):
    tiny_recipe.rows = {"causal": {}, "mma": {"against": "casual"}}
    with pytest.raises(RecipeError, match=r"rows\.mma\.against.*'casual'.*Did you mean 'causal'"):
        check(tiny_recipe)


def test_more_compute_is_said(table1):
    results = with_costs({"causal": [result(0, 0.6, [])], "dot": [result(0, 0.6, [])], "mma": [result(0, 0.7, [])]})
    results["dot-without-it-pt"] = results["dot-without-it-sft"] = results["causal"]
    said = "\n".join(remarks(Comparison(table1, results)))
    assert "Compute: MMA 1.67 times causal's FLOPs; all others had as many" in said
    assert "In DOT (w/o I&T)PT pre-training has no label after the picture" in said
    assert "except DOT (w/o I&T)SFT, trained and asked with the text first. Trained in both orders: DOT" in said


@pytest.fixture
def table1():
    return load_recipe("digits-table1")


class TestPlan:
    def test_a_pretraining_is_shared_by_the_rows_of_a_seed(self, tiny_recipe):
        tiny_recipe.rows = rows_by_rule(["causal", "mma"])
        cells = plan(tiny_recipe, ["causal", "mma"], range(2))
        assert [(cell.name, cell.start_from, cell.recipe.seed) for cell in cells] == [
            ("pretrain", None, 0),
            ("pretrain-seed1", None, 1),
            ("causal", "pretrain", 0),
            ("causal-seed1", "pretrain-seed1", 1),
            ("mma", "pretrain", 0),
            ("mma-seed1", "pretrain-seed1", 1),
        ]
        assert [cell.recipe.sft.rule for cell in cells if cell.stage == "sft"] == ["causal", "causal", "mma", "mma"]

    def test_the_papers_rows(self, table1):
        """Paper, section 5: which order and rule each row has in which stage."""
        cells = {cell.row: cell for cell in plan(table1, table1.rows, [0]) if cell.stage == "sft"}
        starts = {cell.name: cell for cell in plan(table1, table1.rows, [0]) if cell.stage == "pretrain"}
        said = {
            row: [(part.order, part.rule) for part in (starts[cell.start_from].recipe.pretrain, cell.recipe.sft)]
            for row, cell in cells.items()
        }
        i, t, both = "image_first", "text_first", "both"
        assert said == {
            "causal": [(i, "causal"), (i, "causal")],
            "concentric": [(i, "concentric"), (i, "concentric")],
            "dot": [(both, "causal"), (both, "causal")],
            "mma": [(i, "causal"), (i, "mma")],
            "dot-equal-tokens": [(both, "causal"), (both, "causal")],
            "dot-without-ti-pt": [(i, "causal"), (both, "causal")],
            "dot-without-it-pt": [(t, "causal"), (both, "causal")],
            "dot-without-ti-sft": [(both, "causal"), (i, "causal")],
            "dot-without-it-sft": [(both, "causal"), (t, "causal")],
            "prefix": [(i, "causal"), (i, "prefix")],
            "image-bidirectional": [(i, "causal"), (i, "image_bidirectional")],
            "mma-image-bidirectional": [(i, "causal"), (i, "mma+image_bidirectional")],
        }
        shared = {row for row, cell in cells.items() if cell.start_from == "pretrain"}
        assert shared == {
            "causal",
            "mma",
            "dot-without-ti-pt",
            "prefix",
            "image-bidirectional",
            "mma-image-bidirectional",
        }
        equal, dot = cells["dot-equal-tokens"], cells["dot"]
        assert 2 * equal.recipe.sft.batch_size == dot.recipe.sft.batch_size == cells["causal"].recipe.sft.batch_size
        assert 2 * starts[equal.start_from].recipe.pretrain.batch_size == table1.pretrain.batch_size

    def test_a_name_means_the_same_whatever_is_asked_for(self, table1):
        whole = {cell.name: cell.fingerprint for cell in plan(table1, table1.rows, range(2))}
        some = plan(table1, ["dot-without-ti-sft", "mma"], [1])
        assert {cell.name for cell in some} == {
            "pretrain-dot-seed1",
            "pretrain-seed1",
            "dot-without-ti-sft-seed1",
            "mma-seed1",
        }
        assert all(whole[cell.name] == cell.fingerprint for cell in some)

    def test_a_learning_rate_is_the_rows_own_and_the_cosine_keeps_its_shape(self, table1):
        (mma,) = (c for c in plan(table1, ["mma"], [0], {"mma": 1e-2}) if c.stage == "sft")
        sft = mma.recipe.sft
        assert sft.learning_rate == 1e-2
        assert sft.min_learning_rate / 1e-2 == pytest.approx(table1.sft.min_learning_rate / table1.sft.learning_rate)

    def test_fields_that_others_add_with_defaults_change_no_fingerprint(self, tiny_recipe):
        tiny_recipe.rows = rows_by_rule(["mma"])
        spelled_out = replace(tiny_recipe, bf16=False, sft=replace(tiny_recipe.sft, clip=1.0))
        (_, ours), (_, theirs) = (plan(recipe, ["mma"], [0]) for recipe in (tiny_recipe, spelled_out))
        assert ours.fingerprint == theirs.fingerprint
        other = replace(tiny_recipe, sft=replace(tiny_recipe.sft, clip=0.5))
        assert plan(other, ["mma"], [0])[1].fingerprint != ours.fingerprint

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            ({"a": {"sft": {"rul": "mma"}}}, r"rows\.a: unknown key 'sft\.rul': did you mean 'rule'"),
            ({"a": {"sft": {"rule": "nma"}}}, r"rows\.a: there is no attention rule 'nma'"),
            ({"a": {"stf": {}}}, r"rows\.a: unknown key 'stf'"),
            ({"a": 3}, r"rows\.a should be a mapping"),
            ({"a": {"sft": {"task": "caption", "eval_every": 0}}}, r"rows\.a: .* set sft\.task to question"),
            (
                {"a": {"sft": {"sources": VQA, "eval_every": 0}}},
                r"rows\.a: .* nothing is held out .*data\.held_out",
            ),
        ],
    )
    def test_a_row_that_is_no_recipe_is_named(self, tiny_recipe, rows, message, tmp_path):
        tiny_recipe.rows = rows
        with pytest.raises(RecipeError, match=message):
            run_comparison(tiny_recipe, tmp_path, ["a"], 1, 1)
        assert not list(tmp_path.iterdir()), "nothing was begun"

    def test_the_recipe_in_the_docs(self, tiny_recipe):
        page = Path("docs/training.md").read_text().split("## Comparing rules on your own data")[1]
        fragment = yaml.safe_load(page.split("```yaml\n")[1].split("```")[0])
        values = beyond_defaults(tiny_recipe)
        for name, value in fragment.items():
            values[name] = values[name] | value if name in ("sft", "data") else value
        recipe = build(Recipe, values, "")
        check(recipe)
        assert {cell.name for cell in plan(recipe, recipe.rows, [0])} == {"pretrain", "pretrain-dot", *recipe.rows}

    def test_a_recipe_without_pretraining_has_cells_of_sft_alone(self, tiny_recipe):
        tiny_recipe.pretrain, tiny_recipe.rows = None, rows_by_rule(["causal", "mma"])
        cells = [(cell.name, cell.stage, cell.start_from) for cell in plan(tiny_recipe, ["causal", "mma"], range(1))]
        assert cells == [("causal", "sft", None), ("mma", "sft", None)]
        assert fast(tiny_recipe).stages == ("sft",)

    def test_the_first_stage_starts_from_what_the_recipe_does(self, tiny_recipe, tmp_path, monkeypatch):
        monkeypatch.setattr("aki.training.stages.run_stage", lambda job: job.start_from)
        tiny_recipe.start_from, tiny_recipe.rows = "runs/before", rows_by_rule(["mma"])
        pretrain, sft = plan(tiny_recipe, ["mma"], [0])
        assert (_train(pretrain, tmp_path), _train(sft, tmp_path)) == (Path("runs/before"), tmp_path / "pretrain")


def test_compare_from_the_command_line_and_again(tiny_recipe, tmp_path, capsys):
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(yaml.safe_dump(beyond_defaults(tiny_recipe)))
    arguments = ["compare", str(recipe), "--output", str(out)]
    main(arguments)
    said = capsys.readouterr().out
    assert "| mma - causal |" in said
    assert said.count("?  ") + said.count(".  ") >= 3, "three questions are answered"
    assert Image.open(out / "curves.png").size[0] > 500
    assert Image.open(out / "report.png").size[0] > 500
    assert Image.open(out / "scene.png").size == (240, 240)
    causal, mma = (json.loads((out / rule / "result.json").read_text()) for rule in ("causal", "mma"))
    assert causal["recipe"]["sft"].pop("rule") == "causal"
    assert mma["recipe"]["sft"].pop("rule") == "mma"
    assert causal["recipe"] == mma["recipe"]
    assert causal["parameters"] == mma["parameters"]
    written = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert len(written) >= 3
    main(arguments)
    assert {path: path.stat().st_mtime_ns for path in written} == written, "nothing is trained twice"
    assert capsys.readouterr().out == said

    # Where only the small files came along, the report is made again from them.
    report = (out / "report.md").read_bytes()
    for folder in [path for path in out.iterdir() if path.is_dir() and path.name != "cells"]:
        shutil.rmtree(folder)
    (out / "report.md").unlink()
    main(arguments)
    assert (out / "report.md").read_bytes() == report
    assert not (out / "pretrain").exists(), "nothing was trained"
    with pytest.raises(SystemExit):
        main([*arguments, "--sft.learning-rate", "3e-3"])
    assert "was trained by another recipe" in capsys.readouterr().err


def test_every_row_of_table_1_end_to_end(tmp_path, capsys):
    """As `aki compare digits-table1 --seeds 1 --fast`: under two minutes, one learning rate tried."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    main(
        [
            "compare",
            "digits-table1",
            "--seeds",
            "1",
            "--fast",
            "--parallel",
            "1",
            "--output",
            str(tmp_path),
        ]
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Of both processes together, because a machine that does other things is slower by the clock.
    assert after.ru_utime - before.ru_utime < 120
    said = capsys.readouterr().out
    recipe = load_recipe("digits-table1")
    for row in recipe.rows.values():
        assert f"| {row['title']} | 1 | " in said
    cells = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "cells").glob("*.json")}
    assert all(cells[row]["test"]["accuracy"] >= 0 and cells[row]["tokens"] > 0 for row in recipe.rows)
    assert cells["dot"]["tokens"] > 1.9 * cells["causal"]["tokens"]


def test_learning_rates_are_tried_on_a_seed_of_their_own_and_a_killed_comparison_continues(
    tiny_recipe, tmp_path, monkeypatch
):
    tiny_recipe.rows = rows_by_rule(["causal"])
    tiny_recipe.learning_rates = (1e-5, 1e-2)
    kept = compare.write_json

    def killed(path, value):
        kept(path, value)
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        run_comparison(tiny_recipe, tmp_path, ["causal"], 1, 1)
    assert [path.name for path in (tmp_path / "cells").glob("*.json")] == ["pretrain-seed1000.json"]
    before = (tmp_path / "pretrain-seed1000/model.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(compare, "write_json", kept)

    found = run_comparison(tiny_recipe, tmp_path, ["causal"], 1, 1)
    assert (tmp_path / "pretrain-seed1000/model.safetensors").stat().st_mtime_ns == before
    cells = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "cells").glob("*.json")}
    slow, fast = "causal-lr1e-05-seed1000", "causal-lr0.01-seed1000"
    assert cells.keys() == {"pretrain", "causal", "pretrain-seed1000", slow, fast}
    tried = found.searched["causal"]
    assert tried == {1e-5: cells[slow]["validation"]["accuracy"], 1e-2: cells[fast]["validation"]["accuracy"]}
    assert cells["causal"]["learning_rate"] == max(tried, key=tried.get)
    assert [run["cell"] for run in found.results["causal"]] == ["causal"]


@pytest.fixture
def own_data(tiny_recipe, tmp_path):
    """A comparison over files as they are released: captions from shards, then VQAv2; asked GQA and other VQAv2."""
    write_shards(tmp_path / "shards")
    for folder in ("learned", "asked"):
        write_sources(tmp_path / folder)
    (tmp_path / "asked/gqa/images/2354787.jpg").write_text("no picture")
    values = beyond_defaults(tiny_recipe) | {"root": str(tmp_path), "cache": str(tmp_path / "cache")}
    values["data"] |= yaml.safe_load("""
    held_out:
      - {kind: vqav2, annotations: asked/vqav2, images: asked/coco/train2014}
      - {kind: gqa, annotations: asked/gqa, images: asked/gqa/images}
    """)
    values["pretrain"] |= {"shards": [{"kind": "kale", "urls": "shards/kale/{000000..000003}.tar"}], "steps": 2}
    vqa = {"kind": "vqav2", "annotations": "learned/vqav2", "images": "learned/coco/train2014"}
    values["sft"] |= {"sources": [vqa], "rule": "causal", "steps": 4, "eval_every": 2}
    values["rows"] = {
        "causal": {},
        "mma": {"sft": {"rule": "mma"}},
        "dot": {"pretrain": {"order": "both"}, "sft": {"order": "both"}},
        "text-first": {"sft": {"order": "text_first"}},
    }
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_a_comparison_on_ones_own_data_is_killed_and_goes_on(own_data, tmp_path, monkeypatch, capsys):
    out, kept = tmp_path / "out", compare.write_json
    arguments = ["compare", str(own_data), "--output", str(out), "--parallel", "1"]

    def killed(path, value):
        kept(path, value)
        if path.stem == "causal":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(compare, "write_json", killed)
        with pytest.raises(SystemExit, match="130"):
            main(arguments)
    before = (out / "causal/model.safetensors").stat().st_mtime_ns
    assert not (out / "report.md").exists()
    main(arguments)
    assert (out / "causal/model.safetensors").stat().st_mtime_ns == before

    cells = {path.stem: json.loads(path.read_text()) for path in (out / "cells").glob("*.json")}
    assert cells.keys() == {"pretrain", "pretrain-dot", "causal", "mma", "dot", "text-first"}
    assert all(cells[row]["test"].keys() == {"accuracy", "vqav2", "gqa"} for row in ("causal", "mma", "dot"))
    assert all([point["step"] for point in cells[row]["curve"]] == [2, 4] for row in ("causal", "text-first"))
    for stage, row in (("pretrain", "pretrain-dot"), ("causal", "dot")):
        assert cells[row]["tokens"] == pytest.approx(2 * cells[stage]["tokens"], rel=0.05)
    report = (out / "report.md").read_text()
    assert "| rule | all | vqav2 | gqa |" in report
    assert "searching" not in report
    asked = cells["mma"]["held_out"]
    assert (asked["validation"] + asked["test"], asked["sources"]) == (7, ["gqa", "vqav2"])
    assert f"Asked {asked['test']} held-out questions of gqa, vqav2" in report
    assert "1 of 8 samples skipped: gqa broken image 1" in report
    assert "Time a step" in report
    ratios = {row: step["ratio"] for row, step in json.loads((out / "steps.json").read_text())["rows"].items()}
    assert ratios.keys() == {"causal", "mma", "dot", "text-first"}
    assert Image.open(out / "curves.png").size[0] > 500
    said = capsys.readouterr().out
    assert f"aki chat {out}/text-first --image PICTURE QUESTION" in said
    shutil.rmtree(tmp_path / "asked")
    main(arguments)
    assert capsys.readouterr().out == said, "from the small files, without the data"


@pytest.mark.slow
def test_a_cell_that_fails_is_named_with_its_reason(tiny_recipe, tmp_path):
    tiny_recipe.sft = replace(tiny_recipe.sft, max_length=8)
    tiny_recipe.rows = rows_by_rule(["causal"])
    with pytest.raises(CellError, match=r"the cell causal failed: digits/\S+: answer lost to truncation: .* keeps 8"):
        run_comparison(tiny_recipe, tmp_path, ["causal"], 1, 1)
    assert "Traceback" in (tmp_path / "log.txt").read_text()
