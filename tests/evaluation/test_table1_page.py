"""docs/table1-digits.md says what the committed cells hold."""

import json
import runpy
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def page() -> dict:
    return runpy.run_path(str(ROOT / "docs" / "table1_page.py"))


def test_the_page_is_made_again_from_the_cells(page):
    text = (ROOT / "docs" / "table1-digits.md").read_text()
    for name, part in page["made"]().items():
        assert f"{page['BEGIN'].format(name)}\n{part}\n{page['END'].format(name)}" in text, "run docs/table1_page.py"
    for picture in ("docs/digits-depth.png", "results/table1-digits/report.png"):
        assert (ROOT / picture).exists()


def test_the_headline_is_the_mean_of_the_cells_by_hand(page):
    """Read from the files alone: MMA's and causal's mean over seeds, as the page prints them."""
    cells = [json.loads(path.read_text()) for path in (ROOT / "results/table1-digits/cells").glob("*.json")]
    text = page["made"]()["report"]
    for row, title in (("causal", "causal, (I&T)PT + (I&T)SFT"), ("mma", "MMA")):
        own = [c["test"]["accuracy"] for c in cells if c["row"] == row and c["stage"] == "sft" and c["seed"] < 1000]
        assert f"| {title} | {len(own)} | {100 * statistics.mean(own):.1f} ± " in text
        assert len(own) == 10
