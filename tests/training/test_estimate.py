"""The dry run's numbers, against counts of real models and sums by hand."""

import importlib.util
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from aki4b import PRETRAIN, SFT
from families import write_model
from transformers import AutoConfig, AutoModelForMultimodalLM

from aki.cli import main
from aki.models import AkiForConditionalGeneration
from aki.training.adapting import quantization_config, with_adapter
from aki.training.estimate import estimate
from aki.training.memory import weight_bytes
from aki.training.model import build_model, model_config, tiny
from aki.training.recipe import (
    AdapterRecipe,
    ModelRecipe,
    QuantizationRecipe,
    Recipe,
    RecipeError,
    StageRecipe,
    load_recipe,
)
from aki.training.start import load_start

ROOT = Path(__file__).parents[2]

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


def adapted(family_folder, **fields):
    stage = StageRecipe(task="question", rule="mma", steps=1, batch_size=2, learning_rate=1e-5, max_length=64)
    return Recipe("mine", ModelRecipe(pretrained=str(family_folder)), sft=stage, **fields)


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return write_model("llava", tmp_path_factory.mktemp("published") / "llava")


def only_configuration(folder, to):
    to.mkdir()
    shutil.copy(folder / "config.json", to)
    return to


def a_step(model):
    """Bytes of weights, of gradients, and of AdamW's moments after a step."""
    loss = sum(p.float().sum() for p in model.parameters() if p.requires_grad)
    loss.backward()
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned)
    optimizer.step()
    moments = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    return [sum(one.nbytes for one in some) for some in (model.parameters(), [p.grad for p in learned], moments)]


@pytest.mark.parametrize(
    "adapter", [None, AdapterRecipe(r=2), AdapterRecipe(kind="dora", r=2, modules_to_save=("connector",))]
)
def test_bytes_are_those_of_a_real_step(llava, adapter, tmp_path):
    """From its configuration alone, against the tensors of the model that is trained."""
    recipe = adapted(only_configuration(llava, tmp_path / "alone"), adapter=adapter)
    found = estimate(recipe, recipe.sft, 1)
    model, _ = load_start(llava)
    model = model if adapter is None else with_adapter(model, adapter, str(llava))
    assert [found.memory[name] for name in ("weights", "gradients", "AdamW")] == a_step(model)
    assert sum(part.trained for part in found.parts.values()) == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )


@pytest.mark.parametrize("bits", [4, 8])
def test_bytes_of_quantised_weights(llava, bits):
    pytest.importorskip("bitsandbytes")
    recipe = adapted(llava, adapter=AdapterRecipe(r=2), quantization=QuantizationRecipe(bits))
    model, _ = load_start(llava, quantization_config(recipe.quantization, str(llava), False))
    if bits == 8:
        layers = [module for module in model.modules() if type(module).__name__ == "Linear8bitLt"]
        scales = sum(4 * layer.out_features for layer in layers)
    else:
        layers = [module for module in model.modules() if type(module).__name__ == "Linear4bit"]
        scales = sum(layer.weight.quant_state.absmax.nbytes for layer in layers)
        scales += sum(layer.weight.quant_state.state2.absmax.nbytes for layer in layers)
    assert layers
    held = sum(parameter.nbytes for parameter in model.parameters()) + scales
    with torch.device("meta"):
        whole = AutoModelForMultimodalLM.from_config(AutoConfig.from_pretrained(llava))
    assert weight_bytes(whole, bits) == pytest.approx(held, rel=2e-3)


def test_checkpointing_keeps_a_layer_and_the_inputs_of_all(llava):
    plain = adapted(llava)
    again = replace(plain, trainer={"gradient_checkpointing": True, "optim": "adamw_8bit"})
    before, after = (estimate(one, one.sft, 1) for one in (plain, again))
    assert before.memory["activations"] == 17 * 4 * 2 * 64 * 64 * 2
    assert after.memory["activations"] == (17 + 2) * 4 * 2 * 64 * 64
    assert after.memory["AdamW"] == before.memory["AdamW"] / 4
    assert after.parts["language_model"].passes == before.parts["language_model"].passes + 1


def test_the_table_of_what_fits_is_made_by_its_commands():
    """Of one model; the others take minutes on a busy machine."""
    spec = importlib.util.spec_from_file_location("fits_table", ROOT / "docs/fits_table.py")
    fits = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fits)
    page = (ROOT / "docs/training.md").read_text()
    for way in fits.WAYS:
        assert fits.line("aki-4b", way) in page
