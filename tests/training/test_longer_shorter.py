"""A run that ends early, a finished one that is given more steps, and one whose recipe differs."""

import json
from dataclasses import replace

import pytest
import torch
from interrupting import interrupt_before

from aki.models import AkiForConditionalGeneration
from aki.training.folder import RunError
from aki.training.stages import Job, run_stage


def run(recipe, folder, **options):
    return run_stage(Job(recipe, "sft", folder, report=lambda news: None, **options))


def weights(folder):
    return AkiForConditionalGeneration.from_pretrained(folder).state_dict()


def same(one, two):
    return all(torch.equal(weight, two[name]) for name, weight in one.items())


@pytest.fixture
def scored(tiny_recipe, monkeypatch):
    """A recipe of 9 steps that is scored after each, with a patience of 2; and a list to write its scores into."""
    tiny_recipe.sft = replace(tiny_recipe.sft, steps=9, eval_every=1, save_every=1, patience=2)
    scores = []
    monkeypatch.setattr(
        "aki.training.stages.accuracy_by_skill", lambda *args, **kwargs: {"accuracy": scores.pop(0) if scores else 0.0}
    )
    return tiny_recipe, scores


def test_patience_ends_a_run_and_keeps_its_best(scored, tmp_path):
    recipe, scores = scored
    scores += [0.1, 0.5, 0.3, 0.5]
    result = run(recipe, tmp_path / "early")
    assert (result["steps"], [point["step"] for point in result["curve"]]) == (4, [1, 2, 3, 4])
    best = tmp_path / "early/training/checkpoint-2"
    assert best.exists(), "the best is kept although newer ones come"
    assert same(weights(best), weights(tmp_path / "early"))
    assert not same(weights(tmp_path / "early/training/checkpoint-4"), weights(tmp_path / "early"))


@pytest.mark.parametrize("step", [3, 4])
def test_patience_is_resumed(scored, tmp_path, monkeypatch, step):
    recipe, scores = scored
    seen = [0.1, 0.5, 0.3, 0.4]
    scores += seen
    run(recipe, tmp_path / "whole")
    scores[:] = seen
    with monkeypatch.context() as patch:
        interrupt_before(patch, step)
        with pytest.raises(KeyboardInterrupt):
            run(recipe, tmp_path / "cut")
    scores[:] = seen[step - 1 :]
    (tmp_path / "cut").rename(tmp_path / "moved")
    assert run(recipe, tmp_path / "moved", resume=True)["steps"] == 4
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "moved"))


def test_a_run_cut_off_after_its_early_end_trains_no_further(scored, tmp_path, monkeypatch):
    recipe, scores = scored
    scores += [0.5, 0.3, 0.4]
    with monkeypatch.context() as patch:
        patch.setattr("aki.training.stages._save", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(recipe, tmp_path)
    assert run(recipe, tmp_path, resume=True)["steps"] == 3


def test_a_finished_run_goes_on_along_the_longer_cosine(tiny_recipe, tmp_path):
    """The rate of each step is the one that a run of all the steps has there."""
    short = replace(tiny_recipe, sft=replace(tiny_recipe.sft, steps=4, eval_every=0))
    longer = replace(short, sft=replace(short.sft, steps=6))
    run(short, tmp_path / "extended")
    extended = run(longer, tmp_path / "extended", resume=True)
    run(longer, tmp_path / "whole")
    assert [step for step, _ in extended["losses"]] == [1, 2, 3, 4, 5, 6]
    rates = [
        {
            entry["step"]: entry["learning_rate"]
            for entry in json.loads(state.read_text())["log_history"]
            if "loss" in entry
        }
        for state in (tmp_path / name / "training/checkpoint-6/trainer_state.json" for name in ("extended", "whole"))
    ]
    assert [rates[0][step] for step in (5, 6)] == [rates[1][step] for step in (5, 6)]
    assert run(longer, tmp_path / "extended", resume=True) == json.loads(json.dumps(extended)), "it is finished now"


def test_more_steps_need_a_checkpoint_and_nothing_else_changed(tiny_recipe, tmp_path):
    recipe = replace(tiny_recipe, sft=replace(tiny_recipe.sft, steps=2, eval_every=0, save_every=0))
    run(recipe, tmp_path)
    longer = replace(recipe, sft=replace(recipe.sft, steps=4))
    with pytest.raises(RunError, match=r"a finished run without a checkpoint \(its save_every was 0\)"):
        run(longer, tmp_path, resume=True)
    assert (tmp_path / "result.json").exists(), "a call that is refused deletes nothing"
    for change, told in (
        ({"steps": 1}, r"another recipe: sft.steps was 2, now it is 1\."),
        ({"steps": 4, "clip": 0.5}, r"sft.steps was 2, now it is 4; sft.clip was its default, now it is 0.5\."),
    ):
        with pytest.raises(RunError, match=told):
            run(replace(recipe, sft=replace(recipe.sft, **change)), tmp_path, resume=True)
