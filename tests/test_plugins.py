"""A rule, a connector and a source out of a user's own file: the blocks of CONTRIBUTING.md, as they stand there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from aki import AkiForConditionalGeneration, plugins
from aki.attention import RULES
from aki.cli import main
from aki.data.sources import SOURCES
from aki.models.connectors import CONNECTORS
from aki.training.recipe import beyond_defaults

ROOT = Path(__file__).parents[1]
COLOURS = {"red": (220, 40, 40), "green": (40, 170, 60)}


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """The file; afterwards nothing of it is left in this process."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    assert len(blocks) == 3
    (tmp_path / "mine.py").write_text("\n".join(blocks))
    monkeypatch.setenv(plugins.VARIABLE, "")
    forget = registered()
    yield tmp_path / "mine.py"
    forget()


def registered():
    """What forgets all plugins that are loaded from here on."""
    kept = [(names, dict(names)) for names in (RULES, CONNECTORS, SOURCES)]
    modules = set(sys.modules)

    def forget():
        for names, before in kept:
            names.clear()
            names.update(before)
        for name in set(sys.modules) - modules:
            if name.startswith("aki_plugin_"):
                del sys.modules[name]
        os.environ[plugins.VARIABLE] = ""

    return forget


@pytest.fixture
def recipe(tiny_recipe, tmp_path):
    """A recipe that says a rule, a connector and sources of the plugin's."""
    lines = []
    for name, colour in COLOURS.items():
        Image.new("RGB", (40, 30), colour).save(tmp_path / f"{name}.png")
        lines.append(f"{name}.png;what colour is it?;{name}")
    for name in ("train.txt", "asked.txt"):
        (tmp_path / name).write_text("\n".join(lines * 4))
    quiz = {"kind": "quiz", "annotations": ["train.txt"], "images": ["."]}
    values = beyond_defaults(tiny_recipe)
    del values["pretrain"]
    values["model"]["connector"] = {"connector": "pooled", "stride": 3}
    values |= {"root": str(tmp_path), "cache": str(tmp_path / "cache")}
    values["data"] |= {"held_out": [quiz | {"annotations": ["asked.txt"]}], "eval_size": 2, "test_size": 2}
    values["sft"] |= {
        "rule": "mma_first",
        "sources": [quiz],
        "steps": 2,
        "eval_every": 0,
        "save_every": 0,
        "max_length": 250,
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "mine.yaml"


@pytest.fixture
def trained(plugin, recipe, tmp_path):
    """A model that was trained with the plugin, in a process that does not know it any more."""
    forget = registered()
    main(["train", str(recipe), "--plugin", str(plugin), "--output", str(tmp_path / "run")])
    forget()
    return tmp_path / "run"


def stops(capsys, *arguments):
    with pytest.raises(SystemExit):
        main([str(one) for one in arguments])
    return capsys.readouterr().err


def test_train_and_chat(trained, plugin, recipe, tmp_path, capsys):
    assert "Your own comes with --plugin" in stops(capsys, "train", recipe, "--output", tmp_path / "no")
    assert "Your own comes with --plugin" in stops(capsys, "chat", trained, "what colour is it?")
    main(["chat", str(trained), "--plugin", str(plugin), "--image", str(tmp_path / "red.png"), "--json", "what?"])
    assert '"rule": "mma_first"' in capsys.readouterr().out
    model = AkiForConditionalGeneration.from_pretrained(trained)
    assert (type(model.model.connector).__name__, model.config.image_seq_length) == ("PooledConnector", 3)


def test_compare_trains_in_processes_that_know_it(plugin, recipe, tmp_path, capsys):
    rules = ["--rules", "causal", "mma_first", "--parallel", "1", "--fast"]
    main(["compare", str(recipe), "--plugin", str(plugin), "--output", str(tmp_path / "table"), *rules])
    assert "mma_first" in (tmp_path / "table/report.md").read_text()


def test_eval_opens_it(trained, plugin, tmp_path, monkeypatch):
    pytest.importorskip("lmms_eval")
    opened = []
    monkeypatch.setattr("aki.evaluation.run.evaluate", lambda evaluation, model, name: opened.append(model))
    main(["eval", str(trained), "--plugin", str(plugin), "--output", str(tmp_path / "out")])
    assert opened[0].model.config.attention_rule == "mma_first"


def test_serve_opens_it(trained, plugin, monkeypatch):
    served = []
    monkeypatch.setattr("aki.apps.serve.server.serve", lambda engine, *args, **kwargs: served.append(engine))
    main(["serve", str(trained), "--plugin", str(plugin)])
    assert served[0].model.config.attention_rule == "mma_first"


def test_mask_draws_it(plugin, tmp_path, capsys):
    main(["mask", "--plugin", str(plugin), "--rule", "mma_first", "--picture", str(tmp_path / "mask.png")])
    assert "mma_first: " in capsys.readouterr().out


def test_the_environment_names_it_to_any_program(plugin):
    code = "import aki; from aki.attention import RULES; print('mma_first' in RULES)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {plugins.VARIABLE: str(plugin)}, capture_output=True, text=True
    )
    assert done.stdout.strip() == "True", done.stderr


def test_what_is_no_plugin_is_a_sentence(plugin, tmp_path, capsys):
    assert "there is no plugin" in stops(capsys, "mask", "--plugin", tmp_path / "no.py")
    (tmp_path / "broken.py").write_text("import nothing_of_this_name")
    assert "broken.py failed: ModuleNotFoundError: No module" in stops(
        capsys, "mask", "--plugin", tmp_path / "broken.py"
    )
    (tmp_path / "other").mkdir()
    (tmp_path / "other/mine.py").write_text("")
    plugins.load([plugin, plugin])
    with pytest.raises(plugins.PluginError, match=r"two plugins are called mine\.py"):
        plugins.load([tmp_path / "other/mine.py"])
