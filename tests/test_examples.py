"""The examples, as people run them."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


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
