"""A folder with an adapter alone: issue 12, entry 26."""

import json

import pytest

from aki.apps.loading import load


@pytest.mark.parametrize("loader", ["apps", "evaluation"])
def test_26_an_adapter_is_named_with_its_model(tmp_path, loader):
    if loader == "evaluation":
        load_model = pytest.importorskip("aki.evaluation.lmms", reason="lmms-eval is not installed").load_model

        def loads(folder):
            return load_model(folder, "auto", None, False, None)
    else:
        loads = load
    folder = tmp_path / "runs/adapter"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "nobody/nothing"}))
    with pytest.raises(ValueError, match="holds an adapter alone, and its model, nobody/nothing, is not there: merge"):
        loads(str(folder))
