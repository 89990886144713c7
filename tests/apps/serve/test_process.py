"""`aki serve` as a process, and the models that it takes."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import threading

import pytest
import torch
from serving import WEB, client, data_url, make_lively, message, picture_bytes, running
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    CLIPImageProcessorPil,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

import aki
from aki.apps.serve.engine import Engine
from aki.cli import main
from aki.models.templates import SHORT

ASKED = {"model": "tiny", "messages": [message("how many digits are red?", data_url(picture_bytes(40)))]}


@pytest.fixture
def process(model_folder):
    """A process that serves."""
    command = [sys.executable, "-m", "aki", "serve", str(model_folder), "--port", "0", "--max-batch", "1"]
    served = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    yield served
    served.kill()
    served.communicate()


def test_from_its_first_line_to_sigterm(process, model_folder, capsys):
    """SIGTERM comes while one answer is given and one waits: both are finished, and the exit code is 0."""
    name, _, address = process.stdout.readline().strip().partition(" answers at ")
    assert name == "tiny"
    assert address.startswith("http://127.0.0.1:")
    assert "in use" in says(capsys, model_folder, "--port", address.split(":")[-1].removesuffix("/v1"))
    assert WEB.get(f"{address}/models", headers={"Host": "localhost:80"}).status_code == 200
    assert WEB.get(f"{address}/models", headers={"Host": "rebinding.example"}).status_code == 400

    said: dict[int, list[str]] = {0: [], 1: []}
    begun = threading.Event()

    def read(which):
        body = ASKED | {"stream": True, "max_tokens": 150}
        with WEB.stream("POST", f"{address}/chat/completions", json=body, timeout=60) as answer:
            for event in answer.iter_lines():
                said[which].append(event)
                if len(said[which]) > 6:
                    begun.set()

    readers = [threading.Thread(target=read, args=(which,)) for which in (0, 1)]
    for reader in readers:
        reader.start()
    assert begun.wait(30)
    process.send_signal(signal.SIGTERM)
    for reader in readers:
        reader.join(60)
    assert process.wait(30) == 0
    for events in said.values():
        assert [line for line in events if line][-1] == "data: [DONE]"
        pieces = [json.loads(line[6:]) for line in events if line.startswith("data: {")]
        assert pieces[-1]["choices"][0]["finish_reason"] == "length"
    assert process.stderr.read() == ""


def says(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main(["serve", *map(str, arguments)])
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_what_cannot_be_served_is_said_in_a_sentence(model_folder, llava_folder, tmp_path, capsys):
    assert "port 99999 of 127.0.0.1 cannot be had" in says(capsys, model_folder, "--port", "99999")
    assert "port 8000 of no.such.host cannot be had" in says(capsys, model_folder, "--host", "no.such.host")
    assert "there is no model folder" in says(capsys, tmp_path / "nothing")
    assert "add --unlock" in says(capsys, llava_folder)


def test_weights_are_safetensors_only(model_folder, tmp_path):
    """A pickle that would leave a file behind when it is opened."""

    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    folder = tmp_path / "pickled"
    folder.mkdir()
    for file in model_folder.iterdir():
        if file.suffix in (".json", ".jinja"):
            (folder / file.name).write_bytes(file.read_bytes())
    torch.save({"trap": Trap()}, folder / "pytorch_model.bin")
    for unlocked in (False, True):
        with pytest.raises(OSError, match="safetensors"):
            Engine.from_folder(str(folder), unlocked)
    assert not (tmp_path / "sprung").exists()


@pytest.fixture(scope="module")
def llava_folder(model_folder, tmp_path_factory):
    """A tiny LLaVA of transformers' own classes, with the tokenizer of the other model."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_folder)
    images = CLIPImageProcessorPil(size={"height": 16, "width": 16}, do_center_crop=False)
    processor = LlavaProcessor(
        images, tokenizer, patch_size=8, vision_feature_select_strategy="full", chat_template=SHORT
    )
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    config = AutoConfig.for_model(
        "llava",
        text_config={"model_type": "llama", "vocab_size": len(tokenizer), "max_position_embeddings": 256, **sizes}
        | ends,
        vision_config={"model_type": "siglip_vision_model", "image_size": 16, "patch_size": 8, "vision_use_head": False}
        | sizes,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    model = AutoModelForImageTextToText.from_config(config)
    make_lively(model)
    folder = tmp_path_factory.mktemp("other") / "llava"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def unlocked_answer(model, processor, chat):
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template(chat, **options)
    out = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    return processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).lstrip()


def test_an_unlocked_model_of_transformers(llava_folder, tmp_path):
    engine = Engine.from_folder(str(llava_folder), unlocked=True)
    engine.model.double()
    url = data_url(picture_bytes(40))
    chats = [
        [message("how many digits are red?", url)],
        [message("what is this?", url), {"role": "assistant", "content": "two"}, message("and this?")],
        [message("what?")],
    ]
    # Old releases of transformers write into the messages that they are given.
    wanted = [unlocked_answer(engine.model, engine.processor, copy.deepcopy(chat)) for chat in chats]
    with running(engine) as port:
        ask = client(port).chat.completions.create
        said = [ask(model="llava", messages=chat, max_tokens=12).choices[0].message.content for chat in chats]
    assert said == wanted
    aki.lock(engine.model)
    assert unlocked_answer(engine.model, engine.processor, copy.deepcopy(chats[0])) != wanted[0], (
        "the rule makes no difference here"
    )
    aki.unlock(engine.model)
    engine.model.save_pretrained(tmp_path / "kept")
    engine.processor.save_pretrained(tmp_path / "kept")
    again = Engine.from_folder(str(tmp_path / "kept"), unlocked=False)
    assert unlocked_answer(again.model.double(), again.processor, chats[0]) == wanted[0]
