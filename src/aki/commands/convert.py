"""`aki convert`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg


@dataclass
class Convert:
    """Write the published checkpoint as a folder that `aki chat` and from_pretrained load."""

    source: Annotated[Positional[str], arg(metavar="SOURCE")]
    """A folder in the published layout, or a hub id."""
    output: Annotated[Positional[Path], arg(metavar="OUT")]
    """A new folder."""

    def run(self, overrides: list[str]) -> None:
        from aki.models.convert import convert

        done = convert(self.source, self.output)
        dtype = str(done.dtype).removeprefix("torch.")
        files = "1 file" if done.files == 1 else f"{done.files} files"
        print(f"{self.output} holds {done.parameters:,} parameters in {dtype} ({done.bytes / 1e9:.2f} GB in {files}).")
        print(f'Ask it:\n  aki chat {self.output} --image picture.jpg "What is in the picture?"')
