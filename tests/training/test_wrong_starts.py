"""What is wrong with the model that a recipe names, or with what it hands to transformers, is said in a sentence."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml
from families import write_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, TrainingArguments

from aki.cli import main
from aki.models.other import load_other_processor
from aki.training.arguments import read_trainer
from aki.training.memory import checkpoints
from aki.training.model import build_model
from aki.training.recipe import ModelRecipe, Recipe, StageRecipe
from aki.training.recipe.model import BackbonesRecipe


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return write_model("llava", tmp_path_factory.mktemp("published") / "llava")


@pytest.fixture
def says(tmp_path, capsys):
    """What `aki train` says of a recipe, on standard error."""
    (tmp_path / "mine.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": "how many?"}, {"role": "assistant", "content": "one"}]})
    )

    def of(model, *options, **more):
        source = {"kind": "messages", "annotations": str(tmp_path / "mine.jsonl")}
        stage = {"task": "question", "rule": "mma", "steps": 1, "batch_size": 1, "learning_rate": 1e-3}
        stage |= {"warmup_steps": 0, "save_every": 0, "sources": [source]}
        recipe = {"name": "mine", "model": {"pretrained": str(model)}, "sft": stage, "workers": 0, **more}
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
        with pytest.raises(SystemExit) as stopped:
            main(["train", str(tmp_path / "mine.yaml"), "--output", str(tmp_path / "run"), *options])
        assert stopped.value.code == 2
        return capsys.readouterr().err

    return of


@pytest.mark.parametrize("options", [(), ("--dry-run",)])
class TestNoSuchModel:
    def test_text_alone(self, llava, says, tmp_path, options):
        folder, tokenizer = tmp_path / "llama", AutoTokenizer.from_pretrained(llava)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        said = "holds no processor of media; a language model alone" if not options else "which reads text alone: name"
        assert said in says(folder, *options)

    def test_no_folder(self, says, options):
        assert "there is no folder /nowhere/at/all, and " in says("/nowhere/at/all", *options)

    def test_an_adapter_without_its_model(self, says, tmp_path, options):
        (tmp_path / "adapter").mkdir()
        config = {"peft_type": "LORA", "base_model_name_or_path": "/nowhere/model"}
        (tmp_path / "adapter/processor_config.json").write_text("{}")
        (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
        said = says(tmp_path / "adapter", *options)
        assert "adapter holds an adapter alone, and its model, /nowhere/model, is not there" in said


@pytest.mark.parametrize(
    ("lacks", "said"),
    [
        (("processor_config.json",), "holds no processor of media"),
        (("chat_template.jinja",), "has no chat template, which says how a chat is written and where its answers are"),
    ],
)
def test_what_a_folder_lacks(llava, says, tmp_path, lacks, said):
    shutil.copytree(llava, tmp_path / "lacking")
    for name in lacks:
        (tmp_path / "lacking" / name).unlink()
    assert said in says(tmp_path / "lacking")


@pytest.mark.parametrize("part", ["text", "vision"])
def test_a_part_that_is_not_there(tiny_recipe, part):
    tiny_recipe.model.from_backbones = BackbonesRecipe(**{part: "/nowhere/at/all"})
    with pytest.raises(ValueError, match="there is no folder /nowhere/at/all, and no model of this name"):
        build_model(tiny_recipe)


def test_whoever_opens_a_folder_without_processor(llava, tmp_path):
    shutil.copytree(llava, tmp_path / "lacking")
    (tmp_path / "lacking/processor_config.json").unlink()
    with pytest.raises(ValueError, match="holds no processor that transformers could open: copy that of the model"):
        load_other_processor(tmp_path / "lacking")


def test_a_library_that_is_not_installed(llava, says, monkeypatch):
    """As transformers raises it: of Qwen-VL's processor without torchvision, an 8-bit optimizer without its library."""

    def lacking(*args, **kwargs):
        raise ImportError("\nThis processor requires the Torchvision library\nbut it was not found.\n")

    monkeypatch.setattr("aki.models.other.AutoProcessor.from_pretrained", lacking)
    assert says(llava).endswith("aki: This processor requires the Torchvision library but it was not found.\n")


def test_numbers_that_yaml_reads_as_text():
    written = yaml.safe_load("{adam_epsilon: 1e-8, neftune_noise_alpha: 5, optim: adafactor}")
    assert read_trainer(written) == {"adam_epsilon": 1e-8, "neftune_noise_alpha": 5, "optim": "adafactor"}
    with pytest.raises(ValueError, match=r"trainer\.adam_epsilon should be float, it is 'small'"):
        read_trainer({"adam_epsilon": "small"})


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_checkpointing_is_counted_by_either_name(name):
    if name not in TrainingArguments.__dataclass_fields__:
        pytest.skip(f"this release of transformers has no {name}")
    stage = StageRecipe("mma", 1, 1e-3, steps=1, warmup_steps=0)
    assert checkpoints(Recipe("mine", ModelRecipe(pretrained="mine"), sft=stage, trainer={name: True}))
