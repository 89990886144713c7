"""Writes the table of `docs/models.md` by training each family's tiny model: `python docs/models_table.py`.

Videos are read with torchvision, and SmolVLM's with num2words; without them nothing is written.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

PAGE = Path(__file__).with_name("models.md")
BEGIN, END = "<!-- made by docs/models_table.py -->", "<!-- end of the families -->"
NOT_TAKEN = "-"

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "training"))
from abilities import ABILITIES, EVERY_FAMILY, TITLES, ask  # noqa: E402
from families import write_model  # noqa: E402


def outcomes(family: str) -> dict[str, str]:
    """Ability -> what `ask` says of it."""
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(family, Path(folder) / "model", EVERY_FAMILY[family])
        found = {}
        for number, ability in enumerate(ABILITIES):
            (Path(folder) / str(number)).mkdir()
            found[ability] = ask(model, ability, Path(folder) / str(number))
    return found


def row(family: str, found: dict[str, str]) -> str:
    cells = [
        found[ability] if found[ability] == "yes" else "no" if found[ability] else NOT_TAKEN for ability in ABILITIES
    ]
    return f"| {TITLES[family]} | {' | '.join(cells)} |"


def refusals(family: str, found: dict[str, str]) -> list[str]:
    """What a recipe that asks for it ends with."""
    return [f"* {TITLES[family]}, {ability}: *{said}*" for ability, said in found.items() if said not in ("yes", "")]


def table(of: dict[str, dict[str, str]]) -> str:
    """
    Args:
        of: family -> its outcomes.
    """
    head = ["| family | " + " | ".join(ABILITIES) + " |", "| --- |" + " --- |" * len(ABILITIES)]
    rows = [row(family, found) for family, found in of.items()]
    said = [line for family, found in of.items() for line in refusals(family, found)]
    return "\n".join([*head, *rows, *(["", *said] if said else [])])


def main() -> None:
    of = {family: outcomes(family) for family in TITLES}
    before, rest = PAGE.read_text().split(BEGIN)
    _, after = rest.split(END)
    PAGE.write_text(f"{before}{BEGIN}\n{table(of)}\n{END}{after}")


if __name__ == "__main__":
    main()
