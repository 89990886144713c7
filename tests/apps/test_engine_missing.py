"""`--engine vllm` where vLLM is not installed says so before anything is loaded, and else starts its own server."""

import json
import os

import pytest

from aki.apps import vllm
from aki.cli import main


@pytest.fixture
def missing(monkeypatch):
    monkeypatch.setattr(vllm, "find_spec", lambda name: None)
    # Should the check fail, no server takes the place of the tests.
    monkeypatch.setattr(os, "execve", lambda *asked: pytest.fail("a server was started"))


@pytest.mark.parametrize("command", ["serve", "eval"])
def test_a_missing_vllm_is_a_sentence(missing, command, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, str(tmp_path), "--engine", "vllm"])
    assert ended.value.code
    said = capsys.readouterr()
    assert "pip install vllm" in said.err + said.out + str(ended.value.code)


def test_the_server_is_vllm_s_own_with_the_flags_that_keep_it_as_ours(monkeypatch):
    started = {}
    monkeypatch.setattr(vllm, "find_spec", lambda name: object())
    monkeypatch.setattr(
        os, "execve", lambda path, command, environment: started.update(command=command, env=environment)
    )
    command = vllm.server_command("runs/mine", "127.0.0.1", 8001, rule="mma", more=["--max-model-len", "512"])
    vllm.serve(command, "a key")
    assert "a key" not in " ".join(started["command"]), "others can read a command line"
    assert started["env"]["VLLM_API_KEY"] == "a key"
    flags = dict(zip(started["command"], started["command"][1:], strict=False))
    assert flags["--model"] == "runs/mine"
    assert flags["--served-model-name"] == "mine"
    assert flags["--allowed-media-domains"].endswith(".invalid")
    assert json.loads(flags["--hf-overrides"]) == {"attention_rule": "mma"}
    assert started["command"][-2:] == ["--max-model-len", "512"]
