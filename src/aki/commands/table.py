"""`aki table`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg


@dataclass
class Table:
    """Results of `aki eval` under a paper's tables, as Markdown, LaTeX, CSV and a picture; or of your own questions."""

    results: Annotated[Positional[tuple[Path, ...]], arg(metavar="RESULTS...")] = ()
    """Folders with results.json, or such files."""
    against: str = "paper"
    """Whose tables."""
    output: Path = Path("runs/tables")
    """Where the tables and the picture go."""

    def run(self, rest: list[str]) -> None:
        from aki.evaluation.own import own_table
        from aki.evaluation.table_formats import FORMATS, radar
        from aki.evaluation.tables import differences, paper_tables, read_own, read_results

        own = [found for path in self.results if (found := read_own(path)) is not None]
        if own and len(own) < len(self.results):
            raise ValueError("some of these results are of questions of your own, and some are not: show them apart.")
        if own:
            self.output.mkdir(parents=True, exist_ok=True)
            (self.output / "own.md").write_text(own_table(own) + "\n")
            print(f"{own_table(own)}\n\nWritten: {self.output}/own.md")
            return
        ours = [read_results(path) for path in self.results]
        tables = paper_tables(self.against, ours)
        self.output.mkdir(parents=True, exist_ok=True)
        for number, table in enumerate(tables, 1):
            for ending, write in FORMATS.items():
                (self.output / f"table{number}.{ending}").write_text(write(table))
            shown = [row for row in table.rows if row.ours or row.name in ROWS_SHOWN]
            radar(shown, table.columns, self.output / f"table{number}.png")
            print(FORMATS["md"](table))
        for sentence in differences(ours):
            print(f"warning: {sentence}", file=sys.stderr)
        print(f"Written: {self.output}/table1, table2 (.md, .tex, .csv, .png)")


ROWS_SHOWN = ("(I&T)PT + (I&T)SFT†", "CCA†", "MMA†", "AKI-4B†")
"""The paper's rows that the pictures show; the ablations of DOT would hide the rest."""
