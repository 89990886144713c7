"""A saved folder opens without `import aki` first, and no command of ours runs code that lies in a folder."""

import json
import os
import subprocess
import sys

import pytest
import torch
from model_builders import TOKENIZE, user
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from aki import AkiConfig, AkiForConditionalGeneration, AkiProcessor
from aki.apps.loading import load
from aki.models.remote import LOADER
from aki.training.start import load_start

OPENS = """
import sys
import transformers
folder, kinds, again = sys.argv[1], sys.argv[2].split(), sys.argv[3]
assert sys.modules.get("aki") is None
for kind in kinds:
    try:
        opened = getattr(transformers, kind).from_pretrained(folder, trust_remote_code=True)
    except ImportError as error:
        print(error)
    else:
        print(type(opened).__module__, type(opened).__name__)
        opened.save_pretrained(again)
"""
HIDDEN = "import sys; sys.modules['aki'] = None"
OPENED = {
    "AutoModelForImageTextToText": "aki.models.modeling AkiForConditionalGeneration",
    "AutoModel": "aki.models.modeling AkiModel",
    "AutoConfig": "aki.models.configuration AkiConfig",
    "AutoProcessor": "aki.models.processing AkiProcessor",
}


@pytest.fixture
def folder(make_model, processor, tmp_path):
    make_model(attention_rule="prefix").save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def elsewhere(folder, code, *kinds):
    """What a process of its own prints, which opens the folder as each of the kinds."""
    environment = os.environ | {"HF_MODULES_CACHE": str(folder.parent / "modules")}
    command = [sys.executable, "-c", code, str(folder), " ".join(kinds), str(folder.parent / "again")]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout.splitlines()


@pytest.mark.parametrize("kind", OPENED)
def test_a_folder_opens_without_aki_imported(folder, kind):
    assert elsewhere(folder, OPENS, kind) == [OPENED[kind]]
    # What was opened so is saved as before: the package's own modules are not copied.
    assert [path.name for path in (folder.parent / "again").glob("*.py")] == [LOADER.name]


def test_a_folder_names_the_package_where_it_is_not(folder):
    said = elsewhere(folder, HIDDEN + OPENS, *OPENED)
    assert len(said) == len(OPENED)
    assert all(line.startswith("this model needs the package aki: pip install aki-mma") for line in said)


def test_what_a_folder_holds_of_it(folder, make_model, processor):
    for name in ("config.json", "processor_config.json"):
        auto_map = json.loads((folder / name).read_text())["auto_map"]
        assert set(auto_map) == {"AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoProcessor"}
    assert [path.name for path in folder.glob("*.py")] == ["modeling_aki.py"]
    # Saved again from the hub's form, in which transformers names the repository too.
    config = AkiConfig.from_pretrained(folder)
    config.auto_map = {"AutoConfig": "someone/else--configuration.Other"}
    config.save_pretrained(folder)
    assert "someone" not in (folder / "config.json").read_text()


def test_the_same_answers_as_with_aki_imported(folder, make_model, processor, picture):
    inputs = processor.apply_chat_template([user(picture(), "what is this ?")], **TOKENIZE)
    expected = AkiForConditionalGeneration.from_pretrained(folder)(**inputs).logits
    found = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    assert type(found) is AkiForConditionalGeneration
    torch.testing.assert_close(found(**inputs).logits, expected, rtol=0, atol=0)


def test_code_that_lies_in_a_folder_is_not_run(folder, tmp_path, monkeypatch):
    """Not even where a person at the terminal would say yes."""
    ran = tmp_path / "ran"
    evil = f"open({str(ran)!r}, 'w').close()\nfrom transformers import PreTrainedTokenizerFast as Evil\n"
    (folder / "modeling_aki.py").write_text(evil + LOADER.read_text())
    named = json.loads((folder / "tokenizer_config.json").read_text())
    named["auto_map"] = {"AutoTokenizer": [None, "modeling_aki.Evil"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    monkeypatch.setattr("builtins.input", lambda *said: "y")
    for opens in (load, load_start, AutoConfig.from_pretrained, AutoModel.from_pretrained):
        opens(folder)
    AutoProcessor.from_pretrained(folder)
    AkiProcessor.from_pretrained(folder)
    assert not ran.exists()
    # A tokenizer or a model that is nothing but its code is refused.
    named["tokenizer_class"] = "Evil"
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "evil"}))
    for opens in (load, lambda name: load(name, unlock=True), load_start, AkiProcessor.from_pretrained):
        with pytest.raises((ValueError, OSError)):
            opens(folder)
    assert not ran.exists()
