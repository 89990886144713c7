"""What training draws, dropout for instance, goes on in a resumed run as in one that was not cut off."""

from __future__ import annotations

from dataclasses import replace

import pytest
from interrupting import interrupt_before
from test_pretrained import data, of, published, recipe, run  # noqa: F401

from aki.training.recipe import AdapterRecipe


@pytest.mark.parametrize("stage", [{}, {"packing": True, "row_tokens": 600, "batch_size": 2}], ids=["padded", "packed"])
def test_dropout_of_an_adapter(stage, recipe, published, tmp_path, monkeypatch):  # noqa: F811
    recipe = replace(of(recipe, published, "llava", **stage), adapter=AdapterRecipe(r=2, dropout=0.5))
    whole = run(recipe, tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_before(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            run(recipe, tmp_path / "cut")
    assert run(recipe, tmp_path / "cut", resume=True)["losses"] == whole["losses"]
