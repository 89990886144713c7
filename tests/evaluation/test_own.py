"""`aki eval` on questions of the user's own."""

import json

import pytest
import torch
from PIL import Image

from aki.cli import main
from aki.evaluation import own
from aki.models import AkiForConditionalGeneration, AkiProcessor
from aki.training.model import build_model
from aki.training.predictions import majority
from aki.training.recipe import load_recipe

COLOURS = ("red", "green", "blue", "red", "red", "green", "blue")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    recipe = load_recipe("digits")
    recipe.model.text |= {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    torch.manual_seed(0)
    model, processor = build_model(recipe)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    folder = tmp_path_factory.mktemp("own") / "model"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def questions(tmp_path):
    """A file of chats, and the pictures that they are about."""
    lines = []
    for number, colour in enumerate(COLOURS):
        Image.new("RGB", (24, 24), colour).save(tmp_path / f"{number}.png")
        content = [{"type": "image", "image": f"{number}.png"}, {"type": "text", "text": f"colour {number}"}]
        chat = [{"role": "user", "content": content}, {"role": "assistant", "content": colour}]
        lines.append(json.dumps({"messages": chat}))
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join(lines))
    return file


def alone(folder, file):
    """What transformers' generate says to each question by itself."""
    model, processor = AkiForConditionalGeneration.from_pretrained(folder), AkiProcessor.from_pretrained(folder)
    for line in file.read_text().splitlines():
        (part, text) = json.loads(line)["messages"][0]["content"]
        picture = Image.open(file.parent / part["image"])
        chat = [{"role": "user", "content": [{"type": "image", "image": picture}, text]}]
        inputs = processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        out = model.generate(**inputs, max_new_tokens=5, do_sample=False)
        yield processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def run(folder, file, output, *more):
    options = ["--output", str(output), "--limit-new-tokens", "5", "--batch-size", "3", *more]
    main(["eval", str(folder), "--data", str(file), *options])


def test_predictions_and_results(model_folder, questions, tmp_path, capsys):
    output = tmp_path / "results"
    run(model_folder, questions, output, "--metric", "anls")
    lines = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    assert [line["answer"] for line in lines] == list(alone(model_folder, questions))
    assert [line["gold"] for line in lines] == list(COLOURS)
    assert [line["question"] for line in lines] == [f"colour {number}" for number in range(7)]
    assert [line["pictures"] for line in lines] == [[str(questions.parent / f"{n}.png")] for n in range(7)]
    results = json.loads((output / "results.json").read_text())
    assert results["scores"]["accuracy"] == pytest.approx(sum(line["right"] for line in lines) / 7)
    assert results["majority"]["accuracy"] == pytest.approx(3 / 7)
    blind = [json.loads(line) for line in (output / "blind.jsonl").read_text().splitlines()]
    assert [line["pictures"] for line in blind] == [[]] * 7
    shown = capsys.readouterr().out
    assert "asked without the picture" in shown
    main(["table", str(output), "--output", str(tmp_path / "tables")])
    assert "42.9" in capsys.readouterr().out
    assert "majority answer" in (tmp_path / "tables" / "own.md").read_text()


def test_goes_on_where_it_was_cut_off(model_folder, questions, tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(model_folder, questions, whole)
    run(model_folder, questions, cut)
    text = (whole / "predictions.jsonl").read_text()
    # A kill in the middle of the fourth line.
    first = text.split("\n")[:3]
    (cut / "predictions.jsonl").write_text("\n".join(first) + "\n" + text.split("\n")[3][:20])
    asked = []
    answers = own.answers

    def counted(model, collator, samples, *options):
        asked.append(len(samples))
        return answers(model, collator, samples, *options)

    monkeypatch.setattr(own, "answers", counted)
    run(model_folder, questions, cut)
    assert asked == [4, 0]
    assert (cut / "predictions.jsonl").read_text() == text


def test_answers_of_another_rule_are_not_taken(model_folder, questions, tmp_path, capsys):
    run(model_folder, questions, tmp_path / "out", "--limit", "2")
    with pytest.raises(SystemExit):
        run(model_folder, questions, tmp_path / "out", "--limit", "2", "--rule", "causal")
    assert "choose another --output" in capsys.readouterr().err


def test_the_majority_by_hand():
    golds, skills = ["yes", "yes", "no", "3", "4", "4"], ["exists"] * 3 + ["count"] * 3
    assert majority(golds, skills) == pytest.approx({"accuracy": 4 / 6, "exists": 2 / 3, "count": 2 / 3})


@pytest.mark.parametrize("ending", ["csv", "json"])
def test_tables_and_llavas_json(model_folder, questions, tmp_path, ending):
    file = questions.with_suffix(f".{ending}")
    if ending == "csv":
        file.write_text("image,question,answer\n0.png,what?,red\n1.png,what?,green\n")
    else:
        chats = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "red"}]
        file.write_text(json.dumps([{"id": str(n), "image": f"{n}.png", "conversations": chats} for n in range(2)]))
    run(model_folder, file, tmp_path / "out")
    assert len((tmp_path / "out" / "predictions.jsonl").read_text().splitlines()) == 2


def test_every_kind_of_question(model_folder, questions, tmp_path, capsys):
    """Two pictures, a second turn, no picture, a picture that is broken and one that is missing."""
    (tmp_path / "broken.png").write_bytes(b"no picture")

    def asked(*parts):
        return {"role": "user", "content": [*parts, {"type": "text", "text": "what?"}]}

    pictures = [{"type": "image", "image": f"{name}.png"} for name in ("0", "1", "broken", "gone")]
    answer = {"role": "assistant", "content": "red"}
    chats = [
        [asked(*pictures[:2]), answer],
        [asked(pictures[0]), answer, asked(pictures[1]), answer],
        [asked(), answer],
        *([asked(bad), answer] for bad in pictures[2:]),
    ]
    file = tmp_path / "all.jsonl"
    file.write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    run(model_folder, file, tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert [len(line["pictures"]) for line in lines] == [2, 2, 0]
    assert "2 of 5" in capsys.readouterr().out
