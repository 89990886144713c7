"""The examples, as people run them."""

import ast
import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from aki.cli import main

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


@pytest.mark.slow
def test_a_tiny_llava_learns_locked_and_unlocked():
    done = subprocess.run([sys.executable, EXAMPLES / "unlock_llava.py"], capture_output=True, text=True, check=True)
    shares = {}
    for line in done.stdout.splitlines():
        name, numbers = line.split(" ", 1)
        shares[name] = ast.literal_eval(numbers)["accuracy"]
    assert shares.keys() == {"causal", "mma"}
    assert all(share > 0.5 for share in shares.values())
    assert shares["causal"] != shares["mma"]


def test_a_tiny_aki_learns_from_a_list_of_chats():
    done = subprocess.run([sys.executable, EXAMPLES / "train_aki.py"], capture_output=True, text=True, check=True)
    told = dict(line.split(" -> ") for line in done.stdout.splitlines() if " -> " in line)
    assert told == {colour: colour for colour in ("red", "green", "blue", "yellow")}


def test_any_model_by_the_commands_of_the_readme(tmp_path, monkeypatch, capsys):
    """With fewer chats and steps."""
    (block,) = (
        b for b in re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL) if "any_model" in b
    )
    make, *commands = (shlex.split(line, comments=True)[1:] for line in block.strip().splitlines())
    assert [command[0] for command in commands] == ["compare", "chat", "eval"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(EXAMPLES)
    monkeypatch.setattr(sys, "argv", [*make, "--size", "16", "--held-out", "12"])
    runpy.run_path(make[0], run_name="__main__")
    lengths = {"compare": ["--fast", "--parallel", "1"], "chat": ["--max-new-tokens", "2"], "eval": []}
    for command in commands:
        main([*command, *lengths[command[0]]])
    shown = capsys.readouterr().out
    for row in ("| causal | 1 |", "| mma | 1 |", "| majority answer", "| mma, asked without the picture |"):
        assert row in shown
    compared = tmp_path / "runs/any-model/compared"
    rules = [json.loads((compared / row / "config.json").read_text())["attention_rule"] for row in ("causal", "mma")]
    assert rules == ["causal", "mma"]
    assert json.loads((tmp_path / "runs/any-model/eval/results.json").read_text())["settings"]["rule"] == "mma"
