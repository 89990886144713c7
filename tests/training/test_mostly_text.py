"""Issue 12, entry 8: training with a frozen encoder starts where pictures are rare, or none."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from transformers import TrainingArguments

from aki.training import stages
from aki.training.recipe import SourceRecipe
from aki.training.stages import Job, RunError, run_stage, stage_trainer


def own_data(folder, pictures):
    """Forty samples, of which those have a picture."""
    Image.new("RGB", (20, 20), "red").save(folder / "red.png")
    lines = []
    for number in range(40):
        shown = [{"type": "image", "image": "red.png"}] if number in pictures else []
        question = {"role": "user", "content": [*shown, {"type": "text", "text": f"what is number {number}?"}]}
        lines.append({"messages": [question, {"role": "assistant", "content": "it is a number"}]})
    (folder / "own.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return SourceRecipe("messages", (str(folder / "own.jsonl"),), (str(folder),))


@pytest.mark.parametrize("pictures", [(), (5,)], ids=["none", "one in 40"])
def test_12_8_mostly_text_trains(tiny_recipe, tmp_path, monkeypatch, pictures):
    settled_on = []
    monkeypatch.setattr(stages, "lowest_precision", lambda _, pixels: settled_on.append(pixels) or torch.float32)
    source = own_data(tmp_path, pictures)
    tiny_recipe.sft = replace(tiny_recipe.sft, sources=(source,), frozen=("vision_encoder",), eval_every=0)
    result = run_stage(Job(tiny_recipe, "sft", tmp_path / "out", report=lambda news: None))
    assert len(result["losses"]) == tiny_recipe.sft.steps
    assert len(settled_on) == len(pictures)


def test_12_7_a_sharded_encoder_runs_on_all_processes_so_none_may_have_its_features_cached(
    tiny_recipe, tmp_path, monkeypatch
):
    stage = replace(tiny_recipe.pretrain, frozen=("vision_encoder",))
    recipe = replace(tiny_recipe, pretrain=stage, sft=None, feature_cache=str(tmp_path / "cache"))
    model, processor = stages.build_model(recipe)
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    monkeypatch.setattr(stages, "shards_weights", lambda _: True)
    with pytest.raises(RunError, match="feature_cache would let some of them skip it"):
        stage_trainer(
            Job(recipe, "pretrain", tmp_path),
            arguments,
            model,
            stages.stage_collators(processor, stage),
            None,
            stages.Position(),
            None,
        )
