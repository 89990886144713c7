"""Plain dicts of messages, where samples go: into the collator, and through pack."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import aki
from aki.data import BadSample, Sample, assistant, user
from aki.training.model import build_model


@pytest.fixture
def collator(tiny_recipe):
    return aki.ChatCollator(build_model(tiny_recipe)[1], max_length=64)


def picture(tmp_path):
    image = Image.effect_noise((24, 24), 80).convert("RGB")
    image.save(tmp_path / "a.png")
    return image


def test_dicts_give_the_batch_of_their_samples(collator, tmp_path):
    image = picture(tmp_path)
    answer = {"role": "assistant", "content": "red"}
    part = {"type": "text", "text": "what colour?"}
    pictured = [{"role": "user", "content": [{"type": "image"}, part]}, answer]
    written = [
        {"messages": pictured, "images": [image]},
        {"messages": pictured, "images": image},
        {"messages": pictured, "images": [np.asarray(image)]},
        {"messages": pictured, "images": [tmp_path / "a.png"]},
        {"messages": pictured, "images": (tmp_path / "a.png").read_bytes()},
        {"messages": [{"role": "user", "content": "<image>what colour?"}, answer], "images": [str(tmp_path / "a.png")]},
        {"messages": [{"role": "user", "content": [{"type": "image", "image": image}, part]}, answer], "id": 3},
    ]
    sample = Sample([user(image, "what colour?"), assistant("red")], "", "")
    wanted = collator([sample] * len(written))
    got = collator(written)
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    alone, _ = collator.encode(written[0])
    assert torch.equal(alone["input_ids"], collator([sample])["input_ids"])


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        ({"message": []}, "KeyError 'messages'"),
        ({"messages": [{"role": "bot", "content": "a"}]}, "the role 'bot' is none of system, user, assistant"),
        ({"messages": [{"role": "user", "content": "a"}]}, "the chat does not end with an answer"),
        ({"messages": [user(None, "a"), assistant("b")], "images": ["x.png"]}, "1 of 1 images have no image part"),
        ({"messages": [user("no.png", "a"), assistant("b")]}, "missing image"),
        ({"messages": [user(None, "<|user|>"), assistant("b")]}, "special token in a text"),
    ],
)
def test_what_is_no_chat_is_refused(collator, chat, message):
    with pytest.raises(BadSample) as error:
        collator([chat])
    assert message in str(error.value)


def test_packed_dicts_are_whole_documents(tiny_recipe, collator, tmp_path):
    model = build_model(tiny_recipe)[0].eval()
    asked = [user(picture(tmp_path), "what colour?"), assistant("red")], [user(None, "a?"), assistant("b")]
    chats = [{"messages": messages} for messages in asked]
    lengths = [int(collator([chat])["attention_mask"].sum()) for chat in chats]
    packed = aki.pack(collator, model, row_tokens=64)(chats)
    assert packed["input_ids"].shape == (1, sum(lengths))
    logits = model(**packed).logits[0].split(lengths)
    for chat, own in zip(chats, logits, strict=True):
        torch.testing.assert_close(model(**collator([chat])).logits[0], own)


def test_what_a_user_looks_for_is_public():
    assert {"ChatCollator", "pack", "templates"} <= set(aki.__all__)
    assert "{% generation %}" in aki.templates.AKI
    assert Path(aki.templates.__file__).name == "templates.py"
