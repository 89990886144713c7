"""What the trainer's step leaves out, and that leaving it out changes nothing."""

from __future__ import annotations

import inspect
from dataclasses import replace
from itertools import islice

import pytest
import torch
from interrupting import interrupt_before

from aki.data.collate import ChatCollator
from aki.data.digits import DigitScenes
from aki.data.packing import PackedCollator, PackedRows
from aki.models import AkiForConditionalGeneration
from aki.training.stages import Job, build_model, run_stage
from aki.training.trainer import supervised_positions


@pytest.fixture
def parts(tiny_recipe):
    torch.manual_seed(0)
    model, processor = build_model(tiny_recipe)
    data = DigitScenes("train", "question", 40, processor.image_processor.size["height"], tiny_recipe.data.grid)
    collate = ChatCollator(processor, 512)
    return model, collate, data


@pytest.mark.parametrize("packed", [False, True])
def test_loss_and_gradients_from_supervised_positions_are_those_from_all(parts, packed):
    model, collate, data = parts
    batch = collate([data[i] for i in range(6)])
    if packed:
        batch = PackedCollator(0)(list(islice(PackedRows(data, [collate], 100), 2)))
    count = (batch["labels"][:, 1:] != -100).sum()
    everything = model(**batch, num_items_in_batch=count)
    everything.loss.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    kept = supervised_positions(batch["labels"])
    some = model(**batch, num_items_in_batch=count, logits_to_keep=kept)
    some.loss.backward()
    assert everything.logits.shape[1] == batch["input_ids"].shape[1]
    assert some.logits.shape[1] == len(kept) < batch["input_ids"].shape[1]
    assert torch.allclose(some.loss, everything.loss, rtol=1e-6)
    assert all(
        torch.allclose(p.grad, wanted[name], atol=1e-6) for name, p in model.named_parameters() if name in wanted
    )


def test_supervised_positions_are_one_before_the_labels_of_any_row():
    labels = torch.full((2, 6), -100)
    labels[0, 2] = labels[0, 3] = labels[1, 5] = 7
    labels[1, 0] = 7  # nothing comes before it
    assert supervised_positions(labels).tolist() == [1, 2, 4]


def test_the_trainers_step_runs_the_output_layer_on_supervised_positions_alone(tiny_recipe, tmp_path, monkeypatch):
    shapes = output_shapes(monkeypatch)
    run_stage(Job(tiny_recipe, "pretrain", tmp_path / "pretrain"))
    shapes.clear()
    run_stage(Job(tiny_recipe, "sft", tmp_path / "sft", start_from=tmp_path / "pretrain"))
    trained = [(logits, ids) for logits, ids, training in shapes if training]
    assert len(trained) == tiny_recipe.sft.steps
    assert all(logits < ids / 2 for logits, ids in trained)


def output_shapes(monkeypatch) -> list[tuple[int, int, bool]]:
    seen: list[tuple[int, int, bool]] = []
    forward = AkiForConditionalGeneration.forward

    def watched(self, input_ids=None, **kwargs):
        out = forward(self, input_ids=input_ids, **kwargs)
        seen.append((out.logits.shape[1], input_ids.shape[1], self.training))
        return out

    watched.__signature__ = inspect.signature(forward)
    monkeypatch.setattr(AkiForConditionalGeneration, "forward", watched)
    return seen


def test_prefill_runs_the_output_layer_on_the_last_position(parts, monkeypatch):
    model, collate, data = parts
    shapes = output_shapes(monkeypatch)
    batch = collate([data[0]])
    batch.pop("labels")
    model.eval().generate(**batch, max_new_tokens=2, do_sample=False)
    assert [logits for logits, _, _ in shapes] == [1, 1]


def packed(recipe):
    rows = {"packing": True, "row_tokens": 100, "max_length": 100, "batch_size": 1}
    return replace(recipe.sft, **rows, steps=6, save_every=2, eval_every=0)


def test_a_packed_run_resumes_as_if_it_had_not_stopped(tiny_recipe, tmp_path, monkeypatch):
    tiny_recipe.sft = packed(tiny_recipe)
    run_stage(Job(tiny_recipe, "pretrain", tmp_path / "pretrain"))
    start = tmp_path / "pretrain"
    whole = run_stage(Job(tiny_recipe, "sft", tmp_path / "whole", start_from=start))
    with monkeypatch.context() as patch:
        interrupt_before(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            run_stage(Job(tiny_recipe, "sft", tmp_path / "cut", start_from=start))
    resumed = run_stage(Job(tiny_recipe, "sft", tmp_path / "cut", start_from=start, resume=True))
    assert resumed["losses"] == whole["losses"]


def test_frozen_encoder_with_features_from_disk_trains_the_same(tiny_recipe, tmp_path):
    for name in ("pretrain", "sft"):
        setattr(tiny_recipe, name, replace(getattr(tiny_recipe, name), frozen=("vision_encoder",)))
    plain = run_stage(Job(tiny_recipe, "pretrain", tmp_path / "plain"))
    cached = run_stage(
        Job(replace(tiny_recipe, feature_cache=str(tmp_path / "features")), "pretrain", tmp_path / "cached")
    )
    assert cached["losses"] == plain["losses"]
    assert any((tmp_path / "features").rglob("*.safetensors"))


@pytest.mark.parametrize("attention", ["segments", "auto"])
def test_bfloat16_autocast_on_the_cpu_follows_float32(tiny_recipe, tmp_path, attention):
    tiny_recipe.attention = attention
    exact, lower = (
        run_stage(Job(replace(tiny_recipe, bf16=bf16), "pretrain", tmp_path / str(bf16))) for bf16 in (False, True)
    )
    losses = [torch.tensor(result["losses"])[:, 1] for result in (exact, lower)]
    assert torch.allclose(*losses, atol=0.02)
    assert not torch.equal(*losses)
