"""Writes versions and verdicts into the tools' table of `docs/using.md`, by running each row's test."""

from __future__ import annotations

import re
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

PAGE = Path(__file__).with_name("using.md")
TESTS = [Path(__file__).parents[1] / "tests" / "models" / name for name in ("test_tools.py", "test_huggingface.py")]
BEGIN, END = "<!-- made by docs/tools_table.py -->\n", "<!-- end -->"
PACKAGES = {"TRL": "trl", "PEFT": "peft", "accelerate": "accelerate", "model.compile": "torch", "torch.export": "torch"}
VERDICTS = {"passed": "yes", "failed": "**no**", "skipped": "not run"}


class Results:
    """A plugin of pytest: the worst that each test, whatever its parameters, came to."""

    def __init__(self) -> None:
        self.outcomes: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            name = re.sub(r"\[.*", "", report.nodeid.partition("::")[2])
            worst = max(self.outcomes.get(name, "passed"), report.outcome, key=["passed", "skipped", "failed"].index)
            self.outcomes[name] = worst


def written(line: str, outcomes: dict[str, str]) -> str:
    """A row with the installed version and what its test came to."""
    what, _, _, test, *remarks = (cell.strip() for cell in line.strip().strip("|").split("|"))
    package = next((name for word, name in PACKAGES.items() if word in what), "transformers")
    verdict = VERDICTS[outcomes.get(test.strip("`"), "skipped")]
    installed = f"{package} {version(package).partition('+')[0]}"
    return f"| {' | '.join([what, verdict, installed, test, *remarks])} |"


def main() -> int:
    results = Results()
    before, rest = PAGE.read_text().split(BEGIN)
    table, after = rest.split(END)
    head, rule, *rows = table.strip().splitlines()
    wanted = " or ".join(row.split("|")[4].strip(" `").rpartition("::")[2] for row in rows)
    status = pytest.main(["-q", "-p", "no:cacheprovider", "-k", wanted, *map(str, TESTS)], plugins=[results])
    lines = "\n".join([head, rule, *(written(row, results.outcomes) for row in rows)])
    PAGE.write_text(f"{before}{BEGIN}{lines}\n{END}{after}")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
