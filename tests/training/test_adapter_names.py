"""The modules that a recipe's adapter names: those of every family's connector, and none that is passed over."""

from __future__ import annotations

from dataclasses import replace

import pytest
from attention.unlock_families import FAMILIES
from families import write_model

from aki.models.other import load_any, parameters_of
from aki.training.adapting import freeze, with_adapter
from aki.training.recipe import AdapterRecipe, ModelRecipe, Recipe, RecipeError, StageRecipe


@pytest.fixture
def llava(tmp_path):
    return load_any(write_model("llava", tmp_path / "llava"))[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_connector_is_trained_whole(family):
    """All that `frozen` counts to it but what is in no module; Qwen3-VL has a list, one for each layer handed on."""
    model = FAMILIES[family]().model
    alone = {id(parameter) for name, parameter in model.named_parameters() if name.endswith("image_newline")}
    connector = sum(one.numel() for one in parameters_of(model)["connector"] if id(one) not in alone)
    tuned = with_adapter(model, AdapterRecipe(r=2, modules_to_save=("connector",)), None)
    trained = {name: p.numel() for name, p in tuned.named_parameters() if p.requires_grad and "lora_" not in name}
    assert sum(trained.values()) == connector, sorted(trained)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"modules_to_save": ("multi_modal_projektor",)},
            "'multi_modal_projektor' in adapter.modules_to_save",
        ),
        ({"target_modules": ("q_proj", "v_prog")}, "'v_prog' in adapter.target_modules. Did you mean 'v_proj'"),
    ],
)
def test_a_name_that_nothing_has_is_refused(llava, fields, said):
    """PEFT trains what the other names match, and says nothing."""
    with pytest.raises(RecipeError, match=said):
        with_adapter(llava, AdapterRecipe(r=2, **fields), None)


def test_every_linear_layer_by_its_name_in_peft(llava):
    tuned = with_adapter(llava, AdapterRecipe(r=2, target_modules=("all-linear",)), None)
    held = {name.partition(".lora_")[0] for name, p in tuned.named_parameters() if p.requires_grad}
    assert any("vision_tower" in name for name in held)
    assert any("language_model" in name for name in held)
    assert not any("lm_head" in name for name in held)


def test_an_adapter_in_a_frozen_part_is_refused(llava):
    stage = StageRecipe("mma", 1, 1e-3, steps=1, warmup_steps=0, frozen=("vision_encoder",))
    recipe = Recipe("mine", ModelRecipe(pretrained="mine"), sft=stage, adapter=AdapterRecipe(r=2))
    tuned = with_adapter(llava, recipe.adapter, None)
    freeze(tuned, recipe, stage)
    with pytest.raises(RecipeError, match="frozen names language_model, where the adapter would be trained"):
        freeze(tuned, recipe, replace(stage, frozen=("language_model",)))
