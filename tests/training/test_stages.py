"""A stage from start to finish, interrupted and resumed, and refused where it must be."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
import yaml
from interrupting import interrupt_before

from aki.attention import LeakError
from aki.models import AkiForConditionalGeneration, AkiProcessor
from aki.training.checkpoint import last_whole_checkpoint
from aki.training.folder import RunError
from aki.training.recipe import RecipeError, beyond_defaults
from aki.training.stages import Job, build_model, run_stage


def run(recipe, stage, folder, **options):
    return run_stage(Job(recipe, stage, folder, report=lambda news: None, **options))


def test_two_stages_make_a_model_that_loads_and_answers(tiny_recipe, tmp_path):
    first = run(tiny_recipe, "pretrain", tmp_path / "pretrain")
    second = run(tiny_recipe, "sft", tmp_path / "sft", start_from=tmp_path / "pretrain")
    assert [step for step, _ in first["losses"]] == [1, 2, 3, 4]
    assert [point["step"] for point in second["curve"]] == [3, 6]
    assert set(second["test"]) == {"accuracy", "read", "colour", "count_colour", "count_digit", "exists", "relation"}
    before, after = (AkiForConditionalGeneration.from_pretrained(tmp_path / name) for name in ("pretrain", "sft"))
    assert (before.config.attention_rule, after.config.attention_rule) == ("causal", "mma")
    changed = [
        name
        for (name, a), b in zip(before.named_parameters(), after.parameters(), strict=True)
        if not torch.equal(a, b)
    ]
    parts = {name.removeprefix("model.").split(".")[0] for name in changed}
    assert parts == {"vision_encoder", "connector", "language_model", "lm_head"}
    assert AkiProcessor.from_pretrained(tmp_path / "sft").image_seq_length == 9
    assert "step 6/6" in (tmp_path / "sft/training/log.txt").read_text()


def test_frozen_parts_do_not_move(tiny_recipe, tmp_path):
    run(tiny_recipe, "pretrain", tmp_path / "a")
    tiny_recipe.sft = replace(tiny_recipe.sft, frozen=("vision_encoder",), weight_decay=0.5)
    run(tiny_recipe, "sft", tmp_path / "b", start_from=tmp_path / "a")
    before, after = (AkiForConditionalGeneration.from_pretrained(tmp_path / name).state_dict() for name in "ab")
    for name, weight in before.items():
        assert torch.equal(weight, after[name]) == name.startswith("model.vision_encoder"), name


@pytest.mark.parametrize("step", [2, 4, 6])
def test_resumed_equals_uninterrupted(tiny_recipe, tmp_path, monkeypatch, step):
    whole = run(tiny_recipe, "sft", tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_before(patch, step)
        with pytest.raises(KeyboardInterrupt):
            run(tiny_recipe, "sft", tmp_path / "cut")
    resumed = run(tiny_recipe, "sft", tmp_path / "cut", resume=True)
    assert resumed["losses"] == whole["losses"]
    assert resumed["curve"] == whole["curve"]
    assert resumed["test"] == whole["test"]
    one, two = (AkiForConditionalGeneration.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(weight, two[name]) for name, weight in one.items())


def test_a_checkpoint_cut_off_by_a_kill_is_passed_over(tiny_recipe, tmp_path, monkeypatch):
    whole = run(tiny_recipe, "sft", tmp_path / "whole")
    interrupt_before(monkeypatch, 6)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_recipe, "sft", tmp_path / "cut")
    training = tmp_path / "cut/training"
    (training / "checkpoint-4/WHOLE").unlink()
    (training / "checkpoint-4/model.safetensors").write_bytes(b"half")
    assert last_whole_checkpoint(training) == training / "checkpoint-2"
    assert run(tiny_recipe, "sft", tmp_path / "cut", resume=True)["losses"] == whole["losses"]


def test_a_finished_stage_is_not_trained_again(tiny_recipe, tmp_path, monkeypatch):
    result = run(tiny_recipe, "pretrain", tmp_path)
    interrupt_before(monkeypatch, 1)
    assert run(tiny_recipe, "pretrain", tmp_path, resume=True) == json.loads(json.dumps(result))


def test_a_used_output_is_refused(tiny_recipe, tmp_path):
    run(tiny_recipe, "pretrain", tmp_path)
    being_written = tmp_path / "training/checkpoint-9"
    being_written.mkdir()
    with pytest.raises(RunError, match="already holds a run: pass --resume"):
        run(tiny_recipe, "pretrain", tmp_path)
    assert being_written.exists(), "a call that is refused deletes nothing"
    tiny_recipe.pretrain = replace(tiny_recipe.pretrain, learning_rate=0.5)
    with pytest.raises(RunError, match="holds a run of another recipe"):
        run(tiny_recipe, "pretrain", tmp_path, resume=True)
    with pytest.raises(RunError, match="holds no model to start from"):
        run(tiny_recipe, "sft", tmp_path / "new", start_from=tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("part", "name", "value", "message"),
    [
        ("vision", "hiden_size", 8, "unknown key 'hiden_size' in model.vision. Did you mean 'hidden_size'"),
        ("text", "model_type", "lama", "unknown model_type 'lama' in model.text. Did you mean 'llama'"),
        ("connector", "connecter", "mlp", "unknown key 'connecter' in model.connector. Did you mean 'connector'"),
    ],
)
def test_a_models_fields_are_as_strict_as_a_recipes(tiny_recipe, part, name, value, message):
    getattr(tiny_recipe.model, part)[name] = value
    with pytest.raises(RecipeError, match=re.escape(message)):
        build_model(tiny_recipe)


def test_a_run_that_failed_before_it_began_can_be_corrected(tiny_recipe, tmp_path):
    wrong = replace(tiny_recipe.pretrain, rule="mma")
    with pytest.raises(LeakError):
        run(replace(tiny_recipe, pretrain=wrong), "pretrain", tmp_path)
    assert run(tiny_recipe, "pretrain", tmp_path)["losses"]


def test_the_trainer_refuses_mma_on_captions(tiny_recipe, tmp_path):
    tiny_recipe.pretrain = replace(tiny_recipe.pretrain, rule="mma")
    with pytest.raises(LeakError, match=r"opens nothing.*train with pretrain.rule: causal"):
        run(tiny_recipe, "pretrain", tmp_path)


def test_schedule_and_decay_are_the_papers(tiny_recipe, tmp_path):
    """Warm-up from the minimum rate, a cosine back to it; no decay of norms, biases and input embeddings."""
    import math

    from aki.data.feed import Position
    from aki.training.data import stage_collators
    from aki.training.held_out import held_out
    from aki.training.stages import stage_arguments, stage_trainer

    stage = tiny_recipe.sft = replace(
        tiny_recipe.sft, steps=20, warmup_steps=5, min_learning_rate=1e-4, learning_rate=1e-3
    )
    model, processor = build_model(tiny_recipe)
    job = Job(tiny_recipe, "sft", tmp_path)
    collators = stage_collators(processor, stage)
    asked = held_out(tiny_recipe, stage, collators[0])
    trainer = stage_trainer(job, stage_arguments(job), model, collators, None, Position(), asked)
    trainer.create_optimizer_and_scheduler(20)
    rates = []
    for _ in range(20):
        rates.append(trainer.lr_scheduler.get_last_lr()[0])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    low, high = 1e-4, 1e-3
    expected = [low + (high - low) * step / 4 for step in range(5)]
    expected += [low + (high - low) * (1 + math.cos(math.pi * (step - 4) / 15)) / 2 for step in range(5, 20)]
    assert rates == pytest.approx(expected)
    decayed = set(trainer.get_decay_parameter_names(model))
    assert "model.language_model.layers.0.mlp.up_proj.weight" in decayed
    assert "lm_head.weight" in decayed
    assert not any("norm" in name or name.endswith("bias") or "embed_tokens" in name for name in decayed)


@pytest.mark.slow
def test_killed_for_real_and_resumed_from_the_command_line(tiny_recipe, tmp_path):
    tiny_recipe.pretrain = replace(tiny_recipe.pretrain, steps=300, save_every=10)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(beyond_defaults(tiny_recipe)))

    def command(output, *more):
        return [
            sys.executable,
            "-m",
            "aki",
            "train",
            str(recipe),
            "--stage",
            "pretrain",
            "--output",
            str(output),
            *more,
        ]

    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command(tmp_path / "whole"), check=True, env=environment)
    # Several kills, at whatever moment they come: in a step, or while a checkpoint is written.
    for patience in (0.3, 0.31, 0.32):
        process = subprocess.Popen(command(tmp_path / "cut", "--resume"), env=environment, start_new_session=True)
        training = tmp_path / "cut/training"
        before = set(training.glob("checkpoint-*"))
        while process.poll() is None and not set(training.glob("checkpoint-*")) - before:
            time.sleep(0.005)
        time.sleep(patience)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run(command(tmp_path / "cut", "--resume"), check=True, env=environment)
    whole, cut = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "cut"))
    assert cut["losses"] == whole["losses"]
