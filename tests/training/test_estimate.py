"""The dry run's numbers, against counts of real models and sums by hand."""

from dataclasses import replace

import pytest
import torch
from aki4b import PRETRAIN, SFT

from aki.cli import main
from aki.models import AkiForConditionalGeneration
from aki.training.estimate import estimate
from aki.training.model import build_model, model_config, tiny
from aki.training.recipe import RecipeError, load_recipe

CONNECTOR = 6 * (2 * 2 * 1152 + 3 * 1152 * 512 + 512 * 1152 + 2 * 1152 + 2 * 4 * 1152**2)
CONNECTOR += 144 * 1152 + 2 * 1152 + 1152 * 3072 + 3072
"""Layers (two norms, q, k and v, out; norm, two linears), latents, norm, projection (paper, section 2)."""


def test_parameters_of_aki_4b():
    """Those of the released backbones, and of the connector by hand."""
    found = estimate(load_recipe(SFT), load_recipe(SFT).sft, 8)
    assert {name: part.parameters for name, part in found.parts.items()} == {
        "vision_encoder": 428_225_600,
        "connector": CONNECTOR,
        "language_model": 3_821_079_552,
    }
    assert [part.trained for part in found.parts.values()] == [0, CONNECTOR, 3_821_079_552]


def test_tokens_steps_and_flops():
    recipe = load_recipe(SFT)
    found = estimate(recipe, recipe.sft, 8)
    assert (found.tokens, found.image_tokens) == (655, 144)
    assert (found.steps, found.samples_a_step) == (50_000, 32)
    matrices = 3_821_079_552 - 32064 * 3072  # all but the input embeddings
    forward = 2 * matrices * 655 + 4 * 32 * 3072 * 655**2
    assert found.parts["language_model"].forward_flops == pytest.approx(forward)
    assert found.parts["language_model"].passes == 3
    encoder = found.parts["vision_encoder"]
    assert encoder.forward_flops == pytest.approx(2 * 428_225_600 * 729 + 4 * 27 * 1152 * 729**2)
    assert encoder.passes == 1
    per_sample = sum(part.forward_flops * part.passes for part in found.parts.values())
    assert found.flops == pytest.approx(per_sample * 32 * 50_000)


def test_packed_rows_hold_as_many_samples_as_fit_in():
    recipe = load_recipe(SFT)
    alone = estimate(recipe, recipe.sft, 8)
    recipe.sft.packing, recipe.sft.row_tokens = True, 2000
    packed = estimate(recipe, recipe.sft, 8)
    assert packed.samples_a_step == 32 * 3, "655 tokens fit into 2,000 three times"
    assert packed.flops == pytest.approx(3 * alone.flops)


def test_memory_is_shared_under_fsdp():
    recipe = load_recipe(SFT)
    alone, shared = (estimate(recipe, recipe.sft, processes).memory for processes in (1, 8))
    everything, trained = 428_225_600 + CONNECTOR + 3_821_079_552, CONNECTOR + 3_821_079_552
    assert alone["weights"] == 4 * everything
    assert shared["weights"] == 4 * everything / 8
    assert shared["AdamW"] == 8 * trained / 8
    assert shared["activations"] == 34 * 4 * 655 * 3072 * 32
    assert alone["gathered"] == 0
    layer = 3072 * 3 * 3072 + 3072 * 3072 + 3 * 8192 * 3072 + 2 * 3072
    encoder_layer = 4 * (1152**2 + 1152) + 2 * 1152 * 4304 + 4304 + 1152 + 4 * 1152
    assert shared["gathered"] == 2 * (everything - 31 * layer - 27 * encoder_layer)


def test_a_model_is_as_large_as_its_estimate():
    recipe = tiny(load_recipe(PRETRAIN))
    torch.manual_seed(0)
    model = build_model(recipe, ["a caption"])[0]
    config = model_config(recipe.model)
    config.text_config.vocab_size = model.config.text_config.vocab_size
    with torch.device("meta"):
        counted = AkiForConditionalGeneration(config)
    assert counted.num_parameters() == model.num_parameters()


def test_frozen_parts_take_fewer_passes():
    recipe = load_recipe(SFT)
    recipe.sft.frozen = ("vision_encoder", "language_model")
    passes = {name: part.passes for name, part in estimate(recipe, recipe.sft, 1).parts.items()}
    assert passes == {"vision_encoder": 1, "connector": 3, "language_model": 2}


def test_the_command_says_it_without_data_or_weights(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["train", SFT, "--dry-run"])
    said = capsys.readouterr().out
    assert "3,821,079,552" in said
    assert "steps: 50,000 of 32 samples on 8 process(es), 1,600,000 samples in all" in said
    assert "at most 655, 144 of them a picture's" in said
    assert not list(tmp_path.iterdir())


def test_processes_that_cannot_share_a_step_are_refused():
    recipe = load_recipe(SFT)
    with pytest.raises(RecipeError, match=r"a step has 8 batches \(8 devices x 1\), which 3 processes cannot share"):
        estimate(recipe, recipe.sft, 3)
    with pytest.raises(RecipeError, match="processes must be at least 1, it is 0"):
        estimate(recipe, recipe.sft, 0)
    assert [recipe.processes(available) for available in (1, 3, 4, 7, 8, 9)] == [1, 2, 4, 4, 8, 8]


def test_a_length_without_room_for_a_picture_is_refused():
    recipe = load_recipe(SFT)
    recipe.sft.max_length = 144
    with pytest.raises(RecipeError, match="max_length 144 leaves no room for text beside a picture's 144: raise it"):
        estimate(recipe, recipe.sft, 8)


def test_both_orders_are_twice_the_rows(tiny_recipe):
    once = estimate(tiny_recipe, tiny_recipe.sft, 1)
    both = estimate(tiny_recipe, replace(tiny_recipe.sft, order="both"), 1)
    assert both.flops == pytest.approx(2 * once.flops)
    assert both.memory["activations"] == 2 * once.memory["activations"]
    assert both.memory["weights"] == once.memory["weights"]
