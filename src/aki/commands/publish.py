"""`aki publish`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg


@dataclass
class Publish:
    """Put a model on the hub with a card of what it is, what it was trained on and what was measured."""

    folder: Annotated[Positional[Path], arg(metavar="FOLDER")]
    """Of a model or an adapter, as `aki train`, `aki compare` or save_pretrained leaves it."""
    name: Annotated[Positional[str], arg(metavar="NAME")]
    """On the hub, as me/my-model."""
    dry_run: bool = False
    """Write the card into the folder, say what would be uploaded, and stop."""
    license: str | None = None
    """By the hub's name of it, as apache-2.0; left open in the card if absent."""
    private: bool = False
    """Only for its owner, where the repository is new."""

    def run(self, rest: list[str]) -> None:
        from aki.models.publishing import pack_folder, upload
        from aki.training.folder import check_finished

        check_finished(self.folder)
        parcel = pack_folder(self.folder, self.name, self.license)
        print(*parcel.said, sep="\n")
        print(f"{sum(parcel.files.values()) / 1e6:,.1f} MB for {self.name}:")
        for file, size in parcel.files.items():
            print(f"  {size:>15,} bytes  {file}")
        if parcel.left:
            print(f"Stays here: {', '.join(parcel.left)}")
        if self.dry_run:
            print("Nothing was uploaded (--dry-run).")
        else:
            print(f"Uploaded: {upload(parcel, self.private)}")
