"""docs/own-data.md, command by command, with a tiny model and pictures made here."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image

from aki.cli import main
from aki.training.model import build_model
from aki.training.recipe import load_recipe

PAGE = Path(__file__).parents[1] / "docs" / "own-data.md"
COLOURS = ("red", "green", "blue", "yellow")


def commands():
    (block,) = re.findall(r"```sh\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return [shlex.split(line, comments=True)[1:] for line in block.strip().splitlines()]


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A folder as the page's reader has it, who cannot load 7 B: the model is made here."""
    recipe = load_recipe("digits")
    recipe.model.text |= {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    torch.manual_seed(0)
    model, processor = build_model(recipe, ["what colour is this?", *COLOURS])
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    (tmp_path / "images").mkdir()
    for name, size in (("train", 24), ("held-out", 12)):
        lines = []
        for number in range(size):
            colour, picture = COLOURS[number % 4], f"{name}-{number}.png"
            Image.new("RGB", (24, 24), colour).save(tmp_path / "images" / picture)
            asked = [{"type": "image", "image": picture}, {"type": "text", "text": "what colour is this?"}]
            chat = [{"role": "user", "content": asked}, {"role": "assistant", "content": colour}]
            lines.append(json.dumps({"messages": chat}))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def smaller(recipe: Path) -> None:
    """The lines that the page says to change: another model, without an adapter."""
    text = recipe.read_text().replace("llava-hf/llava-1.5-7b-hf", "model").replace("bf16: true", "bf16: false")
    text = text.replace("max_length: 2048", "max_length: 256")
    text = re.sub(r"^adapter:.*\n(  .*\n)+", "", text, flags=re.MULTILINE)
    recipe.write_text(text)


def test_ten_commands(desk, capsys):
    run = commands()
    assert len(run) == 10
    for command in run:
        main(command)
        if command[:2] == ["recipe", "init"]:
            smaller(desk / "mine.yaml")
    shown = capsys.readouterr().out
    report = (desk / "runs/mine/report.md").read_text()
    for text in (report, shown):
        assert "majority answer" in text
        assert "without the picture" in text
    for folder in ("runs/mine/mma", "runs/eval/mma"):
        lines = [json.loads(line) for line in (desk / folder / "predictions.jsonl").read_text().splitlines()]
        assert {line["gold"] for line in lines} <= set(COLOURS)
    results = json.loads((desk / "runs/eval/mma/results.json").read_text())
    assert results["questions"] == len(lines)
    assert (desk / "sheet.png").stat().st_size > 0
    assert "mma" in (desk / "runs/mine/mma/README.md").read_text()
