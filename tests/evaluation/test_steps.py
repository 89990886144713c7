"""The time of a step: what is in it, and the arithmetic by hand."""

import inspect
import json
from dataclasses import replace

import pytest
import torch

from aki.attention import LeakError
from aki.evaluation import steps as steps_module
from aki.evaluation.plan import rows_by_rule
from aki.evaluation.steps import load_steps, ratios, row_steps, take_turns, time_missing, time_steps
from aki.models import AkiForConditionalGeneration
from aki.training.trainer import AkiTrainer


@pytest.fixture
def recipe(tiny_recipe):
    tiny_recipe.rows = rows_by_rule(["causal", "mma"]) | {"both": {"sft": {"rule": "causal", "order": "both"}}}
    return tiny_recipe


def test_ratios_are_medians_of_those_of_each_round():
    # A machine that is three times as slow in the second round says nothing about the row.
    taken = {"causal": [(1.0, 0), (3.0, 0), (1.0, 0)], "mma": [(1.5, 0), (4.2, 0), (1.0, 0)]}
    assert ratios(taken, "causal") == {"causal": 1.0, "mma": pytest.approx(1.4)}


def test_rows_take_turns_there_and_back():
    seen = []
    steps = {name: lambda name=name: seen.append(name) or (1.0, 0.1) for name in "ab"}
    assert take_turns(steps, 2) == {"a": [(1.0, 0.1)] * 2, "b": [(1.0, 0.1)] * 2}
    assert "".join(seen) == "baab" * 2, "two rounds of warm-up, two that count"


def test_a_step_is_the_trainers_own_and_leaves_the_weights(recipe, tmp_path, monkeypatch):
    steps = row_steps(recipe, list(recipe.rows), tmp_path)
    model = steps["causal"].model
    assert all(step.model is model for step in steps.values()), "one model for rows whose models are alike"
    rules, rows = [], []
    forward, training_step = AkiForConditionalGeneration.forward, AkiTrainer.training_step

    def watched(self, **inputs):
        rules.append(self.config.attention_rule)
        assert "logits_to_keep" in inputs, "the output layer runs at supervised positions"
        return forward(self, **inputs)

    def trained(self, model, batch):
        rows.append(len(batch["input_ids"]))
        return training_step(self, model, batch)

    watched.__signature__ = inspect.signature(forward)
    monkeypatch.setattr(AkiForConditionalGeneration, "forward", watched)
    monkeypatch.setattr(AkiTrainer, "training_step", trained)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    for step in steps.values():
        moments = sum(float(state["step"]) for state in step.trainer.optimizer.state.values())
        seconds, guard = step()
        assert seconds > guard > 0
        assert sum(float(s["step"]) for s in step.trainer.optimizer.state.values()) > moments, "AdamW took its step"
    assert rules == ["causal", "mma", "causal"]
    assert rows == [4, 4, 8]
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_batches_that_a_step_accumulates_are_all_in_it(recipe, tmp_path):
    recipe.sft = replace(recipe.sft, gradient_accumulation_steps=3)
    (step,) = row_steps(recipe, ["mma"], tmp_path).values()
    before = step.trainer.guard_seconds
    taken = []
    step.trainer.training_step = lambda model, batch: taken.append(len(batch["input_ids"]))
    step()
    assert taken == [4, 4, 4]
    assert step.trainer.guard_seconds == before


def test_the_guard_is_part_of_it(recipe, tmp_path):
    recipe.sft = replace(recipe.sft, rule="mma", task="caption", eval_every=0)
    (step,) = row_steps(recipe, ["mma"], tmp_path).values()
    with pytest.raises(LeakError):
        step()


def test_measured_once_for_the_rows_as_they_are(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(steps_module, "ROUNDS", 3)
    assert load_steps(recipe, tmp_path) is None
    time_missing(recipe, tmp_path, ["causal", "mma"])
    kept = (tmp_path / "steps.json").read_bytes()
    found = load_steps(recipe, tmp_path)
    assert found == json.loads(kept)
    assert (found["base"], set(found["rows"]), found["rows"]["causal"]["ratio"]) == ("causal", {"causal", "mma"}, 1.0)
    time_missing(recipe, tmp_path, ["mma"])
    assert (tmp_path / "steps.json").read_bytes() == kept, "nothing is measured twice"
    time_missing(recipe, tmp_path, ["both"])
    assert set(load_steps(recipe, tmp_path)["rows"]) == {"causal", "mma", "both"}
    assert load_steps(replace(recipe, seed=5), tmp_path) is None, "of another recipe"


def test_without_causal_the_first_row_is_the_base(recipe, monkeypatch):
    monkeypatch.setattr(steps_module, "ROUNDS", 1)
    assert time_steps(recipe, ["both", "mma"])["base"] == "both"
