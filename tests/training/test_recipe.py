import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from aki import recipes
from aki.evaluation.plan import plan
from aki.training.data import counted
from aki.training.recipe import RecipeError, load_recipe

GQA = [{"kind": "gqa", "annotations": "a"}]


def write(tmp_path, change):
    values = yaml.safe_load((recipes.FOLDER / "digits.yaml").read_text())
    change(values)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.parametrize("name", [name for name in recipes.names() if "/" not in name])
def test_every_recipe_of_ours_loads_by_its_name(name):
    recipe = load_recipe(name)
    assert recipe == load_recipe(recipes.FOLDER / f"{name}.yaml")
    assert recipe.stages
    for stage in map(recipe.stage, recipe.stages):
        assert isinstance(stage.learning_rate, float)
        assert stage.rule == "causal" or stage.task == "question"  # what a caption opened would be its answer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v["sft"].update(stepz=3), r"unknown key 'sft.stepz': did you mean 'steps'\?"),
        (lambda v: v.update(pretain={}), r"unknown key 'pretain': did you mean 'pretrain'\?"),
        (lambda v: v["sft"].pop("steps"), "the key 'sft.steps' is missing"),
        (lambda v: v["sft"].update(steps="many"), "sft.steps should be int, it is 'many'"),
        (lambda v: v["sft"].update(steps=True), "sft.steps should be int"),
        (lambda v: v["sft"].update(steps=0), "steps must be at least 1"),
        (lambda v: v["sft"].update(learning_rate=-1), "learning_rate must be positive"),
        (lambda v: v["sft"].update(packing=True, padding_free=True), "take padding_free or packing"),
        (lambda v: v["sft"].update(padding_free=True), "padding_free needs sources or shards"),
        (lambda v: v["sft"].update(packing=True, row_tokens=400), "must fit a packed row, which has row_tokens: 400"),
        (lambda v: v["sft"].update(eval_every=-1), "eval_every cannot be negative"),
        (lambda v: v["sft"].update(frozen=["vision_encoder", "connector", "language_model"]), "nothing left to train"),
        (lambda v: v["sft"].update(learning_rate="fast"), "sft.learning_rate should be float"),
        (lambda v: v["sft"].update(rule="nma"), r"no attention rule 'nma'.*Did you mean 'mma'\?"),
        (lambda v: v["sft"].update(task="vqa"), "task 'vqa' is not known; there are caption, question"),
        (lambda v: v["sft"].update(frozen=["eyes"]), "frozen 'eyes' is not known"),
        (lambda v: v.update(data=[1]), "data should be a mapping"),
    ],
)
def test_a_wrong_recipe_is_a_sentence_with_the_file(tmp_path, change, message):
    path = write(tmp_path, change)
    with pytest.raises(RecipeError, match=message) as error:
        load_recipe(path)
    assert str(path) in str(error.value)


def test_a_file_goes_before_a_name_and_a_folder_does_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits-depth").mkdir()
    assert load_recipe("digits-depth").name == "digits-depth"
    write(tmp_path, lambda values: values.update(name="mine")).rename(tmp_path / "digits")
    assert load_recipe("digits").name == "mine"
    assert load_recipe("aki-4b/sft").name == "aki-4b-sft"


def test_no_file_no_name_and_no_yaml(tmp_path):
    ours = r"aki-4b/pretrain, aki-4b/sft, digits, digits-depth, digits-table1"
    with pytest.raises(RecipeError, match=rf"there is no recipe at digitz, and aki's own are {ours}"):
        load_recipe("digitz")
    with pytest.raises(RecipeError, match="there is no recipe at"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(RecipeError, match="is not YAML"):
        load_recipe(tmp_path / "bad.yaml")


def test_numbers_as_yaml_writes_them(tmp_path):
    recipe = load_recipe(write(tmp_path, lambda v: v["sft"].update(learning_rate="1e-3", clip=1)))
    assert recipe.sft.learning_rate == 0.001
    assert recipe.sft.clip == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sources": [{"kind": "gqa"}]}, "the key 'sft.sources[0].annotations' is missing"),
        ({"sources": [{"kind": "gqa", "annotations": "a", "wait": 3}]}, "did you mean 'weight'"),
        ({"sources": [{"kind": "gqa", "annotations": "a", "weight": -1}]}, "are numbers from 0 on"),
        ({"sources": [{"kind": "gqa", "annotations": "a", "weight": float("nan")}]}, "are numbers from 0 on"),
        ({"sources": [{"kind": "gqa", "annotations": "a", "weight": 0}]}, "not all zero"),
        ({"max_bad_share": 1.5}, "max_bad_share is a share, from 0 to 1"),
        ({"sources": [{"kind": "gqa", "annotations": "a"}], "shards": [{"kind": "kale", "urls": "u"}]}, "either"),
        ({"shards": [{"kind": "kale", "urls": "u"}], "mixture": "proportional"}, "use weights or uniform"),
        ({"shards": [{"kind": "kale", "urls": "u"}], "mixture": "evenly"}, "mixture 'evenly' is not known"),
        ({"sources": [{"kind": "gqa", "annotations": "a"}], "eval_every": 5}, "sft.eval_every measures held-out"),
        ({"task": "caption", "eval_every": 5}, "a stage that learns captions gives none: set it to 0"),
    ],
)
def test_data_of_a_stage(tmp_path, change, message):
    values = yaml.safe_load((recipes.FOLDER / "digits.yaml").read_text())
    values["sft"] |= {"eval_every": 0} | change
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(RecipeError, match=re.escape(message)):
        load_recipe(path)


@pytest.mark.parametrize(("field", "value"), [("devices", 0), ("workers", -1), ("seed", -1)])
def test_numbers_of_a_run(tmp_path, field, value):
    with pytest.raises(RecipeError, match=f"{field} must be at least {value + 1}, it is {value}"):
        load_recipe(write(tmp_path, lambda v: v.update({field: value})))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"eval_size": 0}, "data.eval_size must be at least 1"),
        ({"test_size": -1}, "data.test_size must be at least 1"),
        ({"held_out": [{"kind": "gqa"}]}, "the key 'data.held_out[0].annotations' is missing"),
        ({"held_out": [{"kind": "gqa", "annotations": "b", "weight": 0}]}, "the weights of data.held_out are numbers"),
        ({"held_out": [{"kind": "gqa", "annotations": "./a/"}]}, "data.held_out and sft.sources both read a: a model"),
        ({"held_out": [{"kind": "datasets", "annotations": "d", "options": {"split": "test"}}]}, None),
    ],
)
def test_what_is_held_out(tmp_path, data, message):
    values = yaml.safe_load((recipes.FOLDER / "digits.yaml").read_text())
    learned = [{"kind": "gqa", "annotations": "a"}, {"kind": "datasets", "annotations": "d"}]
    values["sft"] |= {"eval_every": 5, "sources": learned}
    values["data"] |= data
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    if message is None:
        assert load_recipe(path).data.held_out[0].options == {"split": "test"}
    else:
        with pytest.raises(RecipeError, match=re.escape(message)):
            load_recipe(path)


def test_one_stage_is_a_recipe_and_none_is_not(tmp_path):
    values = yaml.safe_load((recipes.FOLDER / "digits.yaml").read_text())
    del values["pretrain"]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    recipe = load_recipe(path)
    assert recipe.stages == ("sft",)
    with pytest.raises(RecipeError, match="stage 'pretrain' is not known; there are sft"):
        recipe.stage("pretrain")
    del values["sft"]
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(RecipeError, match="at least one stage: pretrain or sft"):
        load_recipe(path)


def test_all_that_is_wrong_is_told_at_once(tmp_path):
    def change(values):
        del values["name"], values["model"]["text"], values["sft"]["rule"], values["pretrain"]["steps"]
        values["sft"] |= {"stepz": 3, "sources": [{"kindd": "gqa"}]}
        values["sedd"] = 1

    with pytest.raises(RecipeError) as error:
        load_recipe(write(tmp_path, change))
    for said in (
        "unknown key 'sedd': did you mean 'seed'?",
        "the key 'name' is missing",
        "the key 'model.text' is missing: name its sizes, or model.pretrained.",
        "the key 'pretrain.steps' is missing: say how many, or epochs",
        "unknown key 'sft.stepz': did you mean 'steps'?",
        "the key 'sft.rule' is missing",
        "unknown key 'sft.sources[0].kindd': did you mean 'kind'?",
        "the key 'sft.sources[0].kind' is missing",
        "the key 'sft.sources[0].annotations' is missing",
    ):
        assert str(error.value).count(said) == 1
    assert ": 9 things are wrong:\n" in str(error.value)


def test_what_a_stage_need_not_say_is_the_papers(tmp_path):
    """Section 4: warm-up 2000 and 150 of 50000 steps, from and to a tenth and a twentieth of the rate."""

    def change(values):
        for stage in ("pretrain", "sft"):
            for name in ("task", "min_learning_rate", "warmup_steps", "weight_decay", "eval_every"):
                values[stage].pop(name, None)
            values[stage]["steps"] = 50000
        values["pretrain"]["learning_rate"], values["sft"]["learning_rate"] = "1e-4", "2e-5"

    recipe = load_recipe(write(tmp_path, change))
    stages = recipe.pretrain, recipe.sft
    assert [stage.task for stage in stages] == ["caption", "question"]
    assert [stage.warm_up for stage in stages] == [2000, 150]
    assert [stage.lowest_rate for stage in stages] == pytest.approx([1e-5, 1e-6])
    assert [stage.weight_decay for stage in stages] == [0.01, 1e-4]
    assert [replace(stage, steps=200).warm_up for stage in stages] == [20, 20]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 1}, "a stage has both, steps and epochs: say one of them"),
        ({"epochs": 1, "steps": None}, "nobody knows how long data without sources is before training: say steps"),
        (
            {"epochs": 1, "steps": None, "packing": True, "sources": GQA},
            "packed rows",
        ),
        (
            {"epochs": 0, "steps": None, "sources": GQA},
            "epochs must be a number above",
        ),
        ({"patience": 2, "eval_every": 5, "save_every": 10}, "to the same steps; they are 5 and 10"),
        ({"patience": -1}, "patience cannot be negative"),
    ],
)
def test_how_long_a_stage_is(tmp_path, change, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(tmp_path, lambda v: v["sft"].update({"eval_every": 0} | change)))


def test_an_epoch_is_as_many_samples_as_the_sources_hold(tmp_path):
    def change(values):
        for number, lines in enumerate((30, 20)):
            chat = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]
            (tmp_path / f"{number}.jsonl").write_text("\n".join([json.dumps({"messages": chat})] * lines))
        sources = [{"kind": "messages", "annotations": str(tmp_path / f"{n}.jsonl"), "name": f"n{n}"} for n in (0, 1)]
        values |= {"devices": 2, "cache": str(tmp_path / "cache")}
        values["sft"] |= {"epochs": 2, "steps": None, "batch_size": 5, "eval_every": 0, "sources": sources}

    recipe = load_recipe(write(tmp_path, change))
    assert counted(recipe, ["sft"]).sft.steps == 2 * (30 + 20) // (2 * 5)
    with pytest.raises(RecipeError, match=r"epochs: 2\.0 are counted where the stage's sources are open"):
        _ = recipe.sft.number_of_steps


def test_a_recorded_comparison_is_still_that_of_its_recipe():
    """What got a default is written down as before it had one, so that finished cells stay finished."""
    cells = Path(__file__).parents[2] / "results" / "table1-digits" / "cells"
    recipe = load_recipe("digits-table1")
    (cell,) = (one for one in plan(recipe, ["causal"], [0]) if one.stage == "pretrain")
    assert json.loads((cells / f"{cell.name}.json").read_text())["fingerprint"] == cell.fingerprint
