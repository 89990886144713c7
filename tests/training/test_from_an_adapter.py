"""A recipe that starts from the folder of an adapter trains what it would of the merged model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_pretrained import data, of, published, recipe, run  # noqa: F401

from aki.cli import main
from aki.models.other import load_any
from aki.training.recipe import AdapterRecipe, ModelRecipe


@pytest.mark.parametrize("saved", [(), ("connector",)])
def test_as_from_the_merged_model(saved, recipe, published, tmp_path):  # noqa: F811
    """With a connector that was trained whole too, which alone would have gone on learning."""
    recipe = of(recipe, published, "llava", steps=2, save_every=0, warmup_steps=0)
    run(replace(recipe, adapter=AdapterRecipe(r=2, modules_to_save=saved)), tmp_path / "adapter")
    main(["convert", "--merge", str(tmp_path / "adapter"), str(tmp_path / "merged")])
    found = {}
    for start in ("adapter", "merged"):
        again = replace(recipe, model=ModelRecipe(pretrained=str(tmp_path / start)))
        losses = run(again, tmp_path / f"from-{start}")["losses"]
        found[start] = losses, load_any(tmp_path / f"from-{start}")[0].state_dict()
    assert found["adapter"][0] == found["merged"][0]
    assert all(torch.equal(weight, found["merged"][1][name]) for name, weight in found["adapter"][1].items())
