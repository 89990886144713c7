"""An adapter that was saved under a rule is under it by whichever method it is put on a model."""

import pytest
import torch
from transformers import AutoModelForImageTextToText
from unlock_chats import QUESTIONS, picture

import aki

peft = pytest.importorskip("peft")

CHAT = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTIONS[0]}]}]


@pytest.fixture
def asked(processor):
    text = processor.apply_chat_template(CHAT, add_generation_prompt=True)
    return processor(images=[picture(90)], text=[text], return_tensors="pt")


@pytest.fixture
def folders(reader, processor, tmp_path):
    """A model that was saved locked, and an adapter of it that was trained under mma."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    aki.lock(reader).save_pretrained(base)
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(AutoModelForImageTextToText.from_pretrained(base), config)
    aki.unlock(tuned, processor, "mma").save_pretrained(adapter)
    processor.save_pretrained(adapter)
    return base, adapter


def logits(model, inputs):
    with torch.no_grad():
        return model.eval()(**inputs).logits


def test_loaded_into_a_model_of_transformers(folders, asked):
    base, adapter = folders
    wanted = logits(AutoModelForImageTextToText.from_pretrained(adapter), asked)
    model = AutoModelForImageTextToText.from_pretrained(base)
    model.load_adapter(str(adapter))
    assert model._aki_unlocked.rule.name == "mma"
    assert torch.equal(logits(model, asked), wanted)


def test_loaded_beside_another_adapter(folders, asked):
    base, adapter = folders
    model = AutoModelForImageTextToText.from_pretrained(base)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.load_adapter(adapter, "mine")
    model.set_adapter("mine")
    assert model.get_base_model()._aki_unlocked.rule.name == "mma"
    assert torch.equal(logits(model, asked), logits(AutoModelForImageTextToText.from_pretrained(adapter), asked))
