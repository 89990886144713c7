"""`aki eval --engine vllm`, which is lmms-eval's own model of vLLM, compiled."""

import json
import sys
from pathlib import Path

import pytest
from folders import FAMILIES

sys.path.append(str(Path(__file__).parents[1] / "evaluation"))
from draw_benchmarks import write_benchmarks

from aki.commands.eval import Eval
from aki.evaluation.lmms import Aki


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmarks")
    write_benchmarks(folder)
    return folder


def test_the_answers_are_those_of_our_own_engine(benchmarks, tmp_path, monkeypatch):
    from aki.evaluation.vllm import Vllm

    folder = FAMILIES["AKI"](tmp_path / "model")
    answers: dict[str, list[str]] = {}
    for engine, owner in (("vllm", Vllm), ("aki", Aki)):
        original = owner.generate_until

        def noted(self, requests, engine=engine, original=original):
            found = original(self, requests)
            # vLLM waits for the rest of a letter, which random weights seldom write.
            answers[engine] = [text.rstrip("\ufffd") for text in found]
            return found

        monkeypatch.setattr(owner, "generate_until", noted)

    def run(engine: str, rule: str | None = None) -> dict:
        output = tmp_path / f"{engine} {rule}"
        command = Eval(str(folder), tasks=("pope",), output=output, data=benchmarks, dtype="float32", rule=rule)
        command.engine = engine
        command.run([])
        return json.loads((output / "results.json").read_text())

    causal = run("aki", "causal")
    under_causal = answers["aki"]
    here, there = run("aki"), run("vllm")
    assert answers["vllm"] == answers["aki"] != under_causal
    assert there["settings"] == here["settings"] | {"backend": "vllm"}
    assert (there["settings"]["rule"], causal["settings"]["rule"]) == ("mma", "causal")
    assert there["columns"]["POPE"]["prompt"] == here["columns"]["POPE"]["prompt"]
