"""The notebooks, run from top to bottom."""

from pathlib import Path

import nbformat
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_what_the_image_read(tmp_path):
    # Somewhere without trained models, where it trains one.
    (tmp_path / "examples").mkdir()
    notebook = nbformat.read(EXAMPLES / "what_the_image_read.ipynb", as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path / "examples"}}).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    pictures = [cell for cell in code if any("image/png" in out.get("data", {}) for out in cell.outputs)]
    assert len(pictures) == 4
    shapes = next(
        out.text for cell in code for out in cell.outputs if "media_to_question" in cell.source and "text" in out
    )
    assert shapes.strip() == "(4, 6, 9) (4, 6, 3, 3)"
