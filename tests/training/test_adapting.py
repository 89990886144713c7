"""Adapters over any model by a recipe: what they train, and that their folders are models everywhere."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from test_pretrained import chats, data, of, published, recipe, run  # noqa: F401

from aki.apps.loading import load
from aki.cli import main
from aki.data.collate import ChatCollator
from aki.evaluation.opening import load_model
from aki.models.other import connectors_of, decoder_path, load_any
from aki.training.folder import RunError
from aki.training.recipe import AdapterRecipe, ModelRecipe, QuantizationRecipe, RecipeError
from aki.training.stages import Job, run_stage, stage_arguments
from aki.training.start import load_start


def adapted(recipe, **fields):  # noqa: F811
    recipe.sft = replace(recipe.sft, steps=2, warmup_steps=0, save_every=0)
    return replace(recipe, adapter=AdapterRecipe(r=2, alpha=4, **fields))


def logits(model, processor, data):  # noqa: F811
    batch = ChatCollator(processor, 400)(chats(data)[:1])
    batch.pop("labels")
    with torch.no_grad():
        return model.eval()(**batch).logits


@pytest.mark.parametrize(
    ("family", "kind"), [("llava", "lora"), ("idefics3", "dora"), ("paddleocr_vl", "rslora"), ("gemma3", "lora")]
)
def test_a_folder_with_an_adapter_is_a_model(family, kind, recipe, published, data, tmp_path):  # noqa: F811
    recipe = of(adapted(recipe, kind=kind, modules_to_save=("connector",)), published, family)
    result = run(recipe, tmp_path / "run")
    written = json.loads((tmp_path / "run/adapter_config.json").read_text())
    assert (written["use_dora"], written["use_rslora"]) == (kind == "dora", kind == "rslora")
    assert written["base_model_name_or_path"] == str(published(family))
    assert not (tmp_path / "run/config.json").exists()
    opened, _ = load(tmp_path / "run")
    assert opened._aki_unlocked.rule.name == "mma"
    assert load_model(str(tmp_path / "run"), "auto", None, False, None)[0]._aki_unlocked.rule.name == "mma"
    # In what was opened, the linears of the language model and the connector moved, and nothing else.
    before = load_any(published(family))[0]
    trained = {
        name.rpartition(".")[0]
        for name, weight in before.named_parameters()
        if not torch.equal(weight, opened.get_parameter(name))
    }
    connectors = connectors_of(before)
    assert any(name.startswith(tuple(connectors)) for name in trained)
    others = {name for name in trained if not name.startswith(tuple(connectors))}
    assert others
    assert all(name.startswith(f"{decoder_path(before)}.") for name in others)
    assert all(isinstance(before.get_submodule(name), torch.nn.Linear) for name in others)
    assert set(result["test"]) == {"accuracy", "messages"}
    # Merged by the command, it is the same model without PEFT.
    main(["convert", "--merge", str(tmp_path / "run"), str(tmp_path / "whole")])
    merged, _ = load(tmp_path / "whole")
    assert merged.config.attention_rule == "mma"
    _, writer = load_start(published(family))
    assert torch.equal(logits(merged, writer, data), logits(opened, writer, data))


def test_the_adapter_that_was_measured_is_the_one_that_opens(recipe, published, data, tmp_path, monkeypatch):  # noqa: F811
    from aki.training.trainer import AkiTrainer

    kept = []
    original = AkiTrainer.train
    monkeypatch.setattr(AkiTrainer, "train", lambda self, **kwargs: (kept.append(self.model), original(self, **kwargs)))
    run(of(adapted(recipe), published, "llava"), tmp_path / "run")
    _, writer = load_start(published("llava"))
    torch.testing.assert_close(
        logits(load(tmp_path / "run")[0], writer, data), logits(kept[0], writer, data), atol=1e-5, rtol=1e-5
    )


def test_resumed_to_the_bit(recipe, published, tmp_path, monkeypatch):  # noqa: F811
    from interrupting import interrupt_before

    recipe = of(adapted(recipe, modules_to_save=("connector",)), published, "llava", steps=4, save_every=2)
    whole = run(recipe, tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_before(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            run(recipe, tmp_path / "cut")
    assert run(recipe, tmp_path / "cut", resume=True)["losses"] == whole["losses"]
    one, two = (load_any(tmp_path / name)[0] for name in ("whole", "cut"))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_over_aki(tiny_recipe, tmp_path):
    run_stage(Job(tiny_recipe, "pretrain", tmp_path / "a", report=lambda news: None))
    recipe = replace(  # noqa: F811
        tiny_recipe, model=ModelRecipe(pretrained=str(tmp_path / "a")), pretrain=None, adapter=AdapterRecipe(r=2)
    )
    run(recipe, tmp_path / "b")
    before, after = load_any(tmp_path / "a")[0], load(tmp_path / "b")[0]
    assert (before.config.attention_rule, after.config.attention_rule) == ("causal", "mma")
    moved = [n for n, p in before.named_parameters() if not torch.equal(p, after.get_parameter(n))]
    assert moved
    assert all(name.startswith("model.language_model.layers") for name in moved)


@pytest.mark.parametrize("bits", [4, 8])
def test_over_quantised_weights(bits, recipe, published, tmp_path):  # noqa: F811
    pytest.importorskip("bitsandbytes")
    recipe = replace(adapted(recipe, modules_to_save=("connector",)), quantization=QuantizationRecipe(bits))
    result = run(of(recipe, published, "llava"), tmp_path / "run")
    assert len(result["losses"]) == 2
    assert load(tmp_path / "run")[0]._aki_unlocked.rule.name == "mma"


def test_a_module_that_is_not_there_is_not_saved_in_silence(recipe, published, tmp_path):  # noqa: F811
    with pytest.raises(RecipeError, match=r"unknown module 'connecter' .* Did you mean 'connector'"):
        run(of(adapted(recipe, modules_to_save=("connecter",)), published, "llava"), tmp_path / "run")


def test_an_adapter_over_frozen_layers_would_not_be_trained(recipe, published, tmp_path):  # noqa: F811
    with pytest.raises(RecipeError, match="frozen names language_model, where the adapter would be trained"):
        run(of(adapted(recipe), published, "llava", frozen=("language_model",)), tmp_path / "run")


def test_quantised_weights_are_not_trained(recipe):  # noqa: F811
    with pytest.raises(RecipeError, match="add an adapter"):
        replace(recipe, quantization=QuantizationRecipe(4))


def test_a_new_model_has_no_adapter(tiny_recipe, tmp_path):
    tiny_recipe.adapter = AdapterRecipe()
    with pytest.raises(RecipeError, match="belongs to a trained model"):
        run(tiny_recipe, tmp_path / "run")


class TestTrainer:
    def test_fields_reach_transformers(self, recipe, published, tmp_path):  # noqa: F811
        recipe.trainer = {"gradient_checkpointing": True, "optim": "adafactor", "save_total_limit": 5}
        arguments = stage_arguments(Job(recipe, "sft", tmp_path))
        assert arguments.gradient_checkpointing
        assert (arguments.optim, arguments.save_total_limit, arguments.max_steps) == ("adafactor", 5, 4)

    def test_a_package_that_is_not_there_is_named(self, recipe, published, tmp_path, monkeypatch):  # noqa: F811
        monkeypatch.setattr("transformers.utils.import_utils.is_liger_kernel_available", lambda *a: False)
        monkeypatch.setattr("transformers.trainer.is_liger_kernel_available", lambda *a: False, raising=False)
        recipe = of(replace(recipe, trainer={"use_liger_kernel": True}), published, "llava")
        with pytest.raises(RunError, match=r"trainer asks for a package that is not installed: .*liger-kernel"):
            run(recipe, tmp_path / "run")

    def test_checkpointing_changes_no_loss(self, recipe, published, tmp_path):  # noqa: F811
        recipe = of(recipe, published, "llava", steps=2, save_every=0)
        plain = run(recipe, tmp_path / "a")["losses"]
        saved = run(replace(recipe, trainer={"gradient_checkpointing": True}), tmp_path / "b")["losses"]
        assert [loss for _, loss in saved] == pytest.approx([loss for _, loss in plain])

    @pytest.mark.parametrize(
        ("field", "said"),
        [
            ({"learning_rate": 1.0}, "said by the stage's learning_rate"),
            ({"output_dir": "x"}, "said by --output"),
            ({"gradient_checkpoint": True}, "Did you mean 'gradient_checkpointing'"),
        ],
    )
    def test_others_are_refused(self, recipe, field, said):  # noqa: F811
        with pytest.raises(ValueError, match=said):
            replace(recipe, trainer=field)


@pytest.mark.parametrize("kind", ["adapter", "whole"])
def test_patience_keeps_the_best_of_another_family(kind, recipe, published, tmp_path, monkeypatch):  # noqa: F811
    """What is saved is the checkpoint of the best score, whatever names a family saves its weights under."""
    scores = [0.1, 0.5, 0.3, 0.3, 0.3]
    monkeypatch.setattr("aki.training.stages.accuracy_by_skill", lambda *a, **k: {"accuracy": scores.pop(0)})
    recipe = adapted(recipe, modules_to_save=("connector",)) if kind == "adapter" else recipe
    recipe = of(recipe, published, "llava", steps=9, eval_every=1, save_every=1, patience=1)
    assert run(recipe, tmp_path)["steps"] == 3
    name = "adapter_model.safetensors" if kind == "adapter" else "model.safetensors"
    saved, best, last = (
        load_file(tmp_path / below / name) for below in ("", *(f"training/checkpoint-{n}" for n in (2, 3)))
    )
    assert all(torch.equal(saved[one], best[one]) for one in best)
    assert not all(torch.equal(saved[one], last[one]) for one in last)
