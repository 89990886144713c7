"""Writes the table of `docs/unlock.md` from a run of the tests: `python docs/unlock_table.py`."""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from pathlib import Path

import pytest

PAGE = Path(__file__).with_name("unlock.md")
TESTS = [Path(__file__).parents[1] / "tests" / "attention" / name for name in ("test_unlock.py", "test_pack.py")]
BEGIN, END = "<!-- made by docs/unlock_table.py -->", "<!-- end -->"
COLUMNS = {
    "test_logits_equal_those_under_the_oracles_mask": "oracle's mask",
    "test_with_labels_the_prompt_is_what_is_not_learned": "labels",
    "test_without_media_bit_for_bit": "no media",
    "test_locked_bit_for_bit": "locked",
    "test_cached_generation_equals:uncached": "cached = uncached",
    "test_cached_generation_equals:static": "= static cache",
    "test_train_step_gives_finite_gradients_to_every_weight_that_trains": "train step",
    "test_answers_are_never_seen_by_what_comes_before": "no leak",
    "test_eager_equals_sdpa": "eager = sdpa",
    "test_kernel_equals_dense": "kernel = dense",
    "test_packed_equals_unpacked:mma": "packed = unpacked",
}
CELLS = {"passed": "yes", "failed": "**no**", "skipped": "n/a"}


class Results:
    """A plugin of pytest that keeps what each test said of each family."""

    def __init__(self) -> None:
        self.cells: dict[str, dict[str, str]] = defaultdict(dict)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        match = re.search(r"::(\w+)\[(.*?)(?:-(uncached|static|mma))?\]$", report.nodeid)
        if match is None or (report.when != "call" and report.outcome == "passed"):
            return
        test, family, how = match.groups()
        column = f"{test}:{how}" if how else test
        if column in COLUMNS:
            self.cells[family][column] = CELLS[report.outcome]


def table(cells: dict[str, dict[str, str]]) -> str:
    lines = ["| family | " + " | ".join(COLUMNS.values()) + " |", "| --- |" + " --- |" * len(COLUMNS)]
    for family, results in cells.items():
        lines.append(f"| {family} | " + " | ".join(results.get(column, "") for column in COLUMNS) + " |")
    return "\n".join(lines)


def main() -> int:
    results = Results()
    # Of a new family the page knows nothing yet.
    options = ["-q", "-p", "no:cacheprovider", "-k", "not the_page_shows"]
    status = pytest.main([*map(str, TESTS), *options], plugins=[results])
    before, rest = PAGE.read_text().split(BEGIN)
    _, after = rest.split(END)
    PAGE.write_text(f"{before}{BEGIN}\n{table(results.cells)}\n{END}{after}")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
