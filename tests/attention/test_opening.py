"""What was saved under a rule opens under it in plain Python, or says that it did not."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    LlamaConfig,
    SiglipVisionConfig,
    pipeline,
)
from unlock_chats import QUESTIONS, picture

import aki
from aki.models.opening import OpenedCausalWarning, as_stock

TURNS = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTIONS[0]}]},
    {"role": "assistant", "content": [{"type": "text", "text": "count"}]},
    {"role": "user", "content": [{"type": "text", "text": QUESTIONS[1]}]},
]


@pytest.fixture
def asked(processor):
    """A chat of two turns, whose picture may see its own question and not the answer."""
    text = processor.apply_chat_template(TURNS, add_generation_prompt=True)
    return processor(images=[picture(90)], text=[text], return_tensors="pt")


@pytest.fixture
def saved(reader, processor, tmp_path):
    """Rule -> a folder that was saved under it; "" is saved locked."""

    def save(rule="mma", with_processor=True):
        folder = tmp_path / (rule or "locked")
        (aki.unlock(reader, processor, rule) if rule else aki.lock(reader)).save_pretrained(folder)
        if with_processor:
            processor.save_pretrained(folder)
        return folder

    return save


def logits(model, inputs):
    with torch.no_grad():
        return model.eval()(**inputs).logits


@pytest.mark.parametrize("rule", ["mma", "image_bidirectional"])
def test_a_folder_opens_under_its_rule(saved, reader, processor, asked, rule):
    folder = saved(rule)
    wanted = logits(reader, asked)
    causal = logits(aki.lock(reader), asked)
    for kind in (AutoModelForImageTextToText, AutoModelForMultimodalLM, type(reader)):
        opened, info = kind.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"]
        assert torch.equal(logits(opened, asked), wanted)
        assert torch.equal(logits(aki.lock(opened), asked), causal)
    assert not torch.allclose(wanted, causal, atol=1e-3)
    # Whoever opens it may say another rule, as of AKI's own models.
    opened = type(reader).from_pretrained(folder, attention_rule="prefix")
    assert torch.equal(logits(opened, asked), logits(aki.unlock(reader, processor, "prefix"), asked))


def test_a_pipeline_too(saved, reader, processor):
    folder = saved()
    pipe = pipeline("image-text-to-text", model=str(folder), device="cpu")
    assert pipe.model._aki_unlocked.rule.name == "mma"


def test_a_folder_saved_locked_is_stock(saved, reader, asked):
    opened = AutoModelForImageTextToText.from_pretrained(saved(""))
    assert not hasattr(opened, "_aki_unlocked")
    assert torch.equal(logits(opened, asked), logits(reader, asked))


def test_without_a_processor_it_says_what_is_lacking(saved, reader, asked, caplog):
    folder = saved(with_processor=False)
    caplog.clear()
    opened = AutoModelForImageTextToText.from_pretrained(folder)
    (said,) = [record.getMessage() for record in caplog.records]
    assert "under the attention rule 'mma' without its processor" in said
    assert torch.equal(logits(opened, asked), logits(aki.unlock(reader), asked))


def test_what_cannot_be_laid_is_a_warning(saved, reader, asked, monkeypatch):
    """The scopes' tokens are the processor's, and this one lost them."""
    folder = saved()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_rule": "mma_scoped"}))
    with pytest.warns(OpenedCausalWarning, match="under the attention rule 'mma_scoped' and is opened causal"):
        opened = AutoModelForImageTextToText.from_pretrained(folder)
    assert torch.equal(logits(opened, asked), logits(aki.lock(reader), asked))


def test_no_code_of_the_folder_runs(saved, tmp_path, monkeypatch):
    folder = saved()
    ran = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    for name in ("processor_config.json", "tokenizer_config.json"):
        written = json.loads((folder / name).read_text())
        written["auto_map"] = {"AutoProcessor": "evil.Evil", "AutoTokenizer": [None, "evil.Evil"]}
        (folder / name).write_text(json.dumps(written))
    monkeypatch.setattr("builtins.input", lambda *said: "y")
    AutoModelForImageTextToText.from_pretrained(folder)
    assert not ran.exists()


def test_within_as_stock_nothing_is_laid(saved, reader, asked):
    folder = saved()
    with as_stock():
        opened = AutoModelForImageTextToText.from_pretrained(folder)
    assert opened.config.attention_rule == "mma"
    assert torch.equal(logits(opened, asked), logits(aki.lock(reader), asked))


@pytest.mark.parametrize("processor_is", ["beside the adapter", "beside the model", "nowhere"])
def test_an_adapter_opens_under_its_rule(saved, reader, processor, asked, tmp_path, processor_is):
    peft = pytest.importorskip("peft")
    base = saved("", with_processor=processor_is == "beside the model")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    marks = None if processor_is == "nowhere" else processor
    model = AutoModelForImageTextToText.from_pretrained(base)
    tuned = aki.unlock(peft.get_peft_model(model, config), marks, "mma")
    tuned.save_pretrained(tmp_path / "adapter")
    if processor_is == "beside the adapter":
        processor.save_pretrained(tmp_path / "adapter")
    wanted = logits(tuned, asked)
    assert not torch.allclose(wanted, logits(aki.lock(tuned), asked), atol=1e-3)
    model = AutoModelForImageTextToText.from_pretrained(base)
    by_peft = peft.PeftModel.from_pretrained(model, tmp_path / "adapter")
    torch.testing.assert_close(logits(by_peft, asked), wanted)
    by_transformers = AutoModelForImageTextToText.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits(by_transformers, asked), wanted)


def test_an_adapter_of_aki(tmp_path):
    peft = pytest.importorskip("peft")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = aki.AkiConfig(
        vision_config=SiglipVisionConfig(image_size=8, patch_size=4, **sizes),
        text_config=LlamaConfig(vocab_size=40, **sizes),
        connector_config={"connector": "mlp"},
        image_token_id=3,
        attention_rule="causal",
    )
    model = aki.AkiForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "base")
    tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    tuned.peft_config["default"].auto_mapping = {"attention_rule": "mma"}
    tuned.save_pretrained(tmp_path / "adapter")
    opened = aki.AkiForConditionalGeneration.from_pretrained(tmp_path / "base")
    assert opened.config.attention_rule == "causal"
    assert peft.PeftModel.from_pretrained(opened, tmp_path / "adapter").config.attention_rule == "mma"


def test_importing_aki_does_not_import_peft():
    code = "import sys, aki; sys.exit('peft' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
