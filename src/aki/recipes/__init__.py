"""The recipes that come with aki, by their names: `aki-4b/sft` is aki-4b/sft.yaml in this folder."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent


def names() -> list[str]:
    """Of all of them, sorted."""
    return sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.rglob("*.yaml"))


def path_of(recipe: str | Path) -> Path:
    """The file that is called so, else aki's own recipe of that name; what is neither comes back as it is."""
    path = Path(recipe)
    return FOLDER / f"{path}.yaml" if not path.is_file() and path.as_posix() in names() else path
