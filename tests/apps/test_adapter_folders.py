"""A folder with an adapter alone answers in every command as PEFT's model under its rule does in plain transformers."""

import json

import pytest
import torch
from apps.serve.serving import client, data_url, message, running
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from training.families import write_model
from transformers import AutoModelForImageTextToText, AutoProcessor

import aki
from aki.apps.demo.reading import Reader, opened
from aki.apps.loading import load
from aki.apps.serve.engine import Engine
from aki.cli import main
from aki.models.other import load_any

QUESTION, LENGTH = "what colour is it?", 6


def lively(family, folder):
    """A random model that says plain words, and others where it sees other things."""
    model, processor = load_any(write_model(family, folder), torch.float32)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.3)
    texts = [processor.tokenizer.decode([token]) for token in range(len(processor.tokenizer))]
    model.generation_config.suppress_tokens = [i for i, text in enumerate(texts) if not text.strip().isalpha()]
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["llava", "paddleocr_vl", "aki"])
def folder(request, model_folder, tmp_path_factory):
    """The adapter's folder, with a processor beside it."""
    base = model_folder if request.param == "aki" else lively(request.param, tmp_path_factory.mktemp("base"))
    stock, processor = load_any(base, torch.float32)
    torch.manual_seed(1)
    config = LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    config.base_model_name_or_path = stock.name_or_path = str(base)
    tuned = get_peft_model(stock, config)
    if request.param == "aki":
        tuned.peft_config["default"].auto_mapping = {"attention_rule": "prefix"}
    else:
        aki.unlock(tuned, processor, "prefix")
    folder = tmp_path_factory.mktemp("adapter")
    tuned.save_pretrained(folder)
    processor.save_pretrained(folder)
    Image.effect_noise((24, 24), 90).convert("RGB").save(folder / "scene.png")
    return folder


@pytest.fixture(scope="module")
def wanted(folder):
    """What generate says, the adapter not merged and the rule laid by hand."""
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    model, processor = AutoModelForImageTextToText.from_pretrained(base), AutoProcessor.from_pretrained(folder)
    tuned = PeftModel.from_pretrained(model, folder).eval()
    said = {}
    for rule in ("causal", "prefix"):
        if model.config.model_type == "aki":
            model.config.attention_rule = rule
        else:
            aki.unlock(tuned, processor, rule)
        content = [{"type": "image", "image": Image.open(folder / "scene.png")}, {"type": "text", "text": QUESTION}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        out = tuned.generate(**inputs, max_new_tokens=LENGTH, do_sample=False)
        said[rule] = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    return said


def test_the_rule_can_be_told_from_the_answer(wanted):
    assert wanted["prefix"]
    assert wanted["prefix"] != wanted["causal"]


def test_chat(folder, wanted, capsys):
    main(["chat", str(folder), "--image", str(folder / "scene.png"), "--max-new-tokens", str(LENGTH), QUESTION])
    assert capsys.readouterr().out.strip() == wanted["prefix"]


def test_demo(folder, wanted):
    *_, (text, explanations, problem) = Reader(*load(folder), LENGTH).read(opened(str(folder / "scene.png")), QUESTION)
    assert text.strip() == wanted["prefix"]
    assert ([one.rule for one in explanations], problem) == (["causal", "prefix"], "")


def test_serve(folder, wanted):
    engine = Engine.from_folder(str(folder), unlocked=False)
    with running(engine) as port:
        asked = message(QUESTION, data_url((folder / "scene.png").read_bytes()))
        answer = client(port).chat.completions.create(
            model=engine.name, messages=[asked], max_tokens=LENGTH, temperature=0
        )
    assert answer.choices[0].message.content.strip() == wanted["prefix"]


def test_eval(folder, wanted, tmp_path):
    content = [{"type": "image", "image": "scene.png"}, {"type": "text", "text": QUESTION}]
    chat = [{"role": "user", "content": content}, {"role": "assistant", "content": "red"}]
    (tmp_path / "asked.jsonl").write_text(json.dumps({"messages": chat}))
    options = ["--data", str(tmp_path / "asked.jsonl"), "--images", str(folder), "--limit-new-tokens", str(LENGTH)]
    main(["eval", str(folder), *options, "--output", str(tmp_path / "out")])
    (line,) = (tmp_path / "out/predictions.jsonl").read_text().splitlines()
    assert json.loads(line)["answer"] == wanted["prefix"]
