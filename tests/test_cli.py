"""The command line: what it says, and what it says no to."""

import io
import json
import subprocess
import sys

import pytest
import torch
from PIL import Image

from aki.attention import RULES
from aki.cli import main
from aki.training.stages import build_model

DIGITS = "digits"
TABLE1 = "digits-table1"


@pytest.fixture
def model_folder(tiny_recipe, tmp_path):
    torch.manual_seed(0)
    model, processor = build_model(tiny_recipe)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    Image.new("RGB", (60, 40), "red").save(tmp_path / "scene.png")
    return tmp_path / "model"


def says(capsys, arguments, code=2):
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    assert stopped.value.code == code
    return capsys.readouterr().err


def test_chat_prints_what_generate_says(model_folder, capsys):
    main(
        [
            "chat",
            str(model_folder),
            "--image",
            str(model_folder.parent / "scene.png"),
            "how many?",
            "--max-new-tokens",
            "4",
        ]
    )
    said = capsys.readouterr().out
    from aki.apps.chat import load

    model, processor = load(model_folder)
    content = [{"type": "image", "path": str(model_folder.parent / "scene.png")}, {"type": "text", "text": "how many?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    out = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert said.strip() == processor.tokenizer.decode(out, skip_special_tokens=True).strip()


def test_chat_streams_and_reads_stdin(model_folder, monkeypatch):
    from aki.apps.chat import answer, load

    model, processor = load(model_folder)
    pieces = []
    whole = answer(model, processor, "how many digits are red?", max_new_tokens=12, emit=pieces.append)
    assert "".join(pieces).strip() == whole


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{model}", "--image", "{folder}/none.png", "what?"], "there is no picture at"),
        (["{model}", "--image", "{folder}/model/config.json", "what?"], "is not a picture"),
        (["{model}", "  "], "the question is empty"),
        (["{model}", "what?", "--rule", "nma"], "Did you mean 'mma'"),
        (["{model}", "what? " * 300], "the model's context is 256"),
        (["{folder}/nowhere", "what?"], "there is no model folder at"),
        (["{folder}/scene.png", "what?"], "there is no model folder at"),
        (["{model}", "what \udcff?"], "not UTF-8"),
        (["{folder}", "what?"], "holds no model: there is no config.json in it"),
    ],
)
def test_chat_refuses_in_a_sentence(model_folder, capsys, arguments, message):
    places = {"model": model_folder, "folder": model_folder.parent}
    said = says(capsys, ["chat", *(argument.format(**places) for argument in arguments)])
    assert said.splitlines()[-1].startswith("aki: ")
    assert message in said.splitlines()[-1]
    assert "Traceback" not in said


def test_mask_draws_and_counts(tmp_path, capsys):
    main(["mask", "--rule", "mma", "--picture", str(tmp_path / "mma.png")])
    # 13 tokens: a user token, 4 of the image, 6 of the question and the start of the answer, 2 of the answer.
    # 13 * 14 / 2 pairs are causal; MMA opens 4 x 6.
    assert capsys.readouterr().out.splitlines()[:2] == [
        "causal: 91 pairs, 0 beyond causal",
        "mma: 115 pairs, 24 beyond causal",
    ]
    assert Image.open(tmp_path / "mma.png").size[0] > 500


def test_every_rule_draws_itself(tmp_path, capsys):
    rules = [rule for rule in RULES if rule != "causal"]
    main(["mask", "--rule", *rules, "mma+image_bidirectional", "--picture", str(tmp_path / "rules.png")])
    said = dict(line.split(":") for line in capsys.readouterr().out.splitlines()[:-1])
    # 18 tokens, a picture of 3 x 3 at 1 to 9, a question of 6, an answer of 2; 171 pairs are causal. Of the 36 pairs
    # ahead within the picture, the centre's 4 and the border's 28 are open in rings; 4 of the border no longer see the
    # centre behind them.
    assert said["concentric"] == " 199 pairs, 32 beyond causal"
    assert said["prefix"] == f" {16 * 16 + 17 + 18} pairs, {16 * 15 // 2} beyond causal"
    assert said["image_bidirectional"] == " 207 pairs, 36 beyond causal"
    assert said["mma"] == said["mma_scoped"] == f" {171 + 9 * 6} pairs, 54 beyond causal"
    assert said["mma+image_bidirectional"] == f" {171 + 54 + 36} pairs, 90 beyond causal"
    assert Image.open(tmp_path / "rules.png").size[1] > 1000


def test_wrong_commands_are_sentences(tmp_path, capsys):
    assert "no recipe at nowhere.yaml" in says(capsys, ["train", "nowhere.yaml"])
    assert "does not know --frobnicate" in says(capsys, ["mask", "--frobnicate"])
    assert "stepz" in says(capsys, ["train", DIGITS, "--sft.stepz", "3"])
    assert "no attention rule" in says(capsys, ["mask", "--rule", "nma"])
    assert "names no picture file" in says(capsys, ["mask", "--picture", tmp_path])
    assert "different rules" in says(capsys, ["compare", DIGITS, "--output", tmp_path, "--rules", "mma", "mma"])
    assert "no attention rule" in says(capsys, ["compare", DIGITS, "--output", tmp_path, "--rules", "causal", "mna"])
    assert "rows of its own" in says(capsys, ["compare", TABLE1, "--output", tmp_path, "--rules", "mma"])
    (tmp_path / "pretrain/training/checkpoint-1").mkdir(parents=True)
    (tmp_path / "pretrain/training/checkpoint-1/WHOLE").touch()
    assert "already holds a run: pass --resume" in says(capsys, ["train", DIGITS, "--output", tmp_path])
    assert "train" in says(capsys, [])


def test_the_module_is_the_command():
    out = subprocess.run([sys.executable, "-m", "aki", "--help"], capture_output=True, text=True, check=True).stdout
    for command in ("train", "compare", "chat", "convert", "demo", "mask"):
        assert command in out


def test_chat_takes_pictures_pipes_and_scripts(model_folder, capsys, monkeypatch):
    scene = str(model_folder.parent / "scene.png")
    arguments = ["chat", str(model_folder), "--image", scene, "--image", scene, "--max-new-tokens", "4"]
    main([*arguments, "how many?"])
    plain = capsys.readouterr().out.strip()
    monkeypatch.setattr("sys.stdin", io.StringIO("how many?\n"))
    main([*arguments, "--json", "--rule", "mma"])
    row = json.loads(capsys.readouterr().out)
    assert row["answer"] == plain
    assert (row["images"], row["rule"], row["question"]) == ([scene, scene], "mma", "how many?")
    assert row["seconds"] > 0


def test_demo_says_what_it_needs(model_folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "aki.apps.demo.page", raising=False)
    assert "pip install 'aki-mma[demo]'" in says(capsys, ["demo", model_folder])
