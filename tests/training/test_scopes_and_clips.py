"""Scopes, tables, videos and audio in a recipe's data, for AKI and for another family."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch
from clip_families import RATE, qwen2_audio
from families import write_model
from PIL import Image
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from aki.apps.loading import load
from aki.attention import get_rule
from aki.data.collate import ChatCollator
from aki.data.report import BadSample
from aki.data.sources import open_source
from aki.data.tokenizer import train_tokenizer
from aki.models import AkiProcessor
from aki.models.templates import AKI
from aki.training.model import tiny
from aki.training.recipe import (
    AdapterRecipe,
    DataRecipe,
    ModelRecipe,
    Recipe,
    RecipeError,
    SourceRecipe,
    StageRecipe,
    load_recipe,
)
from aki.training.stages import Job, run_stage
from aki.training.start import learn_scopes, load_processor, load_start
from aki.training.trainer import layout_of


def figure(name, caption):
    picture = {"type": "image", "image": name}
    return {"type": "scope", "content": [picture, {"type": "text", "text": caption}]}


def asked(*parts, answer="it is red"):
    return [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": answer}]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name in ("red", "blue"):
        Image.new("RGB", (16, 16), name).save(folder / f"{name}.png")
    soundfile.write(folder / "tone.wav", np.sin(np.arange(RATE // 4) / 5).astype("float32"), RATE)
    question = {"type": "text", "text": "is it red or blue?"}
    table = {"type": "table", "rows": [["red", "one"], ["blue", [{"type": "image", "image": "blue.png"}]]]}
    scoped = [asked(figure("red.png", "one"), figure("blue.png", "two"), question), asked(table, question)]
    heard = [asked({"type": "audio", "audio": "tone.wav"}, question)]
    for name, chats in (("scoped", scoped), ("heard", heard)):
        for part in ("train", "asked"):
            lines = [json.dumps({"id": f"{part}{i}", "messages": chats[i % len(chats)]}) for i in range(6)]
            (folder / f"{name}-{part}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def recipe_of(model, data, name, **stage):
    def source(part):
        return SourceRecipe("messages", (str(data / f"{name}-{part}.jsonl"),), (str(data),))

    stage = {"steps": 2, "warmup_steps": 0, "save_every": 0, "log_every": 1, **stage}
    sft = StageRecipe("mma_scoped", 2, 1e-3, sources=(source("train"),), max_length=256, **stage)
    asks = DataRecipe(eval_size=1, test_size=2, held_out=(source("asked"),))
    return Recipe("mine", ModelRecipe(pretrained=str(model)), asks, sft=sft, workers=0)


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return write_model("llava", tmp_path_factory.mktemp("published") / "llava")


@pytest.fixture(scope="module")
def listener(tmp_path_factory):
    return write_model("qwen2_audio", tmp_path_factory.mktemp("published") / "listener", qwen2_audio)


def run(recipe, folder):
    return run_stage(Job(recipe, "sft", folder, report=lambda news: None))


def test_scoped_rule_is_trained_by_a_recipe(llava, data, tmp_path):
    result = run(recipe_of(llava, data, "scoped"), tmp_path / "run")
    assert len(result["losses"]) == 2
    report = json.loads((tmp_path / "run/data_report.json").read_text())
    assert "special token" not in json.dumps(report)
    model, processor = load(tmp_path / "run")
    assert model.config.attention_rule == "mma_scoped"
    vocabulary = processor.tokenizer.get_vocab()
    assert {"<|scope|>", "<|/scope|>"} <= vocabulary.keys()
    assert model.get_input_embeddings().weight.shape[0] > max(vocabulary["<|scope|>"], vocabulary["<|/scope|>"])


def test_a_picture_sees_its_own_caption_and_the_question(llava, data):
    """By the layout of the batch that is trained: not the other figure's caption."""
    from aki.attention import unlock

    model, processor = load_start(llava)
    learn_scopes(model, processor, False)
    unlock(model, processor, "mma_scoped")
    source = open_source("messages", annotations=[data / "scoped-train.jsonl"], images=[data])
    batch, _ = ChatCollator(processor, 256).encode(source[0])
    layout, ids = layout_of(model, batch), batch["input_ids"][0].tolist()
    first = ids.index(processor.image_token_id)
    closes = [at for at, one in enumerate(ids) if one == processor.tokenizer.convert_tokens_to_ids("<|/scope|>")]
    assert len(closes) == 2
    one, two, question = closes[0] - 1, closes[1] - 1, closes[1] + 1
    sees = get_rule("mma_scoped").sees
    row = torch.tensor(0)
    assert [bool(sees(layout, row, torch.tensor(first), torch.tensor(at))) for at in (one, two, question)] == [
        True,
        False,
        True,
    ]


def test_other_rules_and_adapters(llava, data, tmp_path):
    """Without a rule that reads them the tokens of scopes are left out; new ones below an adapter are refused."""
    source = open_source("messages", annotations=[data / "scoped-train.jsonl"], images=[data])
    processor = load_processor(llava)
    batch, _ = ChatCollator(processor, 256).encode(source[0])
    assert "scope" not in processor.tokenizer.decode(batch["input_ids"][0])
    recipe = recipe_of(llava, data, "scoped")
    with pytest.raises(RecipeError, match="below an adapter nothing learns them"):
        run(replace(recipe, adapter=AdapterRecipe(r=2)), tmp_path / "run")


def test_audio_through_the_reader(listener, data, tmp_path):
    recipe = recipe_of(listener, data, "heard")
    result = run(replace(recipe, sft=replace(recipe.sft, rule="mma")), tmp_path / "run")
    assert len(result["losses"]) == 2
    source = open_source("messages", annotations=[data / "heard-train.jsonl"], images=[data])
    processor = load_processor(listener)
    batch, _ = ChatCollator(processor, 256).encode(source[0])
    heard = processor.feature_extractor(soundfile.read(data / "tone.wav")[0], sampling_rate=RATE, return_tensors="pt")
    torch.testing.assert_close(batch["input_features"], heard["input_features"], atol=1e-5, rtol=1e-5)


def test_a_clip_that_the_processor_does_not_take_is_counted(llava, data):
    source = open_source("messages", annotations=[data / "heard-train.jsonl"], images=[data])
    with pytest.raises(BadSample, match="audio not taken"):
        ChatCollator(load_processor(llava), 256).encode(source[0])


def test_a_picture_that_the_processor_does_not_take_is_counted(listener, data):
    """Its template would leave it out without a word."""
    source = open_source("messages", annotations=[data / "scoped-train.jsonl"], images=[data])
    with pytest.raises(BadSample, match="image not taken"):
        ChatCollator(load_processor(listener), 256).encode(source[0])


def test_a_frame_that_is_broken_is_counted(data, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    processor = watcher()
    film = {"type": "video", "video": [str(data / "red.png"), str(tmp_path / "broken.png")]}
    with pytest.raises(BadSample, match="broken image"):
        ChatCollator(processor, 256).encode({"messages": asked(film, {"type": "text", "text": "what happens"})})


def test_a_chat_in_which_no_answer_is_found_is_counted(llava, monkeypatch):
    """As of a processor that writes some chats by another template than its own."""
    collator = ChatCollator(load_processor(llava), 256)
    monkeypatch.setattr(collator.processor.wrapped, "chat_template", "{{ messages[-1].content[0].text }}")
    with pytest.raises(BadSample, match="no answer found"):
        collator.encode({"messages": asked({"type": "text", "text": "is it red or blue?"})})


def test_a_new_aki_learns_scopes_too(data, tmp_path):
    sizes = tiny(load_recipe("aki-4b/sft")).model
    recipe = recipe_of("unused", data, "scoped")
    recipe = replace(recipe, model=sizes, sft=replace(recipe.sft, max_length=800))
    run(recipe, tmp_path / "run")
    model, processor = load(tmp_path / "run")
    tokens = processor.tokenizer.convert_tokens_to_ids(["<|scope|>", "<|/scope|>"])
    assert model.config.scope_token_ids == tokens
    assert model.get_input_embeddings().weight.shape[0] == len(processor.tokenizer)


def watcher():
    tokenizer = train_tokenizer(["what happens", "it is red"], bos_token="<s>", more=("<|end|>", "<video>"))
    squares = SiglipImageProcessorPil(size={"height": 16, "width": 16})
    return AkiProcessor(squares, tokenizer, 4, chat_template=AKI, video_seq_length=3, video_frames=2)


def test_frames_of_a_video_through_the_reader(data, tmp_path):
    processor = watcher()
    film = {"type": "video", "video": ["red.png", "blue.png"]}
    chat = {"messages": asked(film, {"type": "text", "text": "what happens"})}
    (tmp_path / "films.jsonl").write_text(json.dumps(chat) + "\n")
    source = open_source("messages", annotations=[tmp_path / "films.jsonl"], images=[data])
    batch, _ = ChatCollator(processor, 256).encode(source[0])
    assert (batch["input_ids"] == processor.video_token_id).sum() == 3
    frames = [
        processor.image_processor(Image.open(data / f"{name}.png"), return_tensors="pt")["pixel_values"]
        for name in ("red", "blue")
    ]
    assert torch.equal(batch["pixel_values_videos"], torch.stack(frames, 1))
