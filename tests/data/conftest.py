import pytest
from fixtures.make import write_sources

from aki.data.sources import open_source


@pytest.fixture(scope="session")
def released(tmp_path_factory) -> dict[str, dict]:
    """kind -> what `open_source` takes, for fixtures of all eleven sources."""
    folder = tmp_path_factory.mktemp("released")
    return {entry["kind"]: {**entry, "cache": folder / "cache"} for entry in write_sources(folder)}


@pytest.fixture
def opened(released):
    """Opens a source's fixtures, with options."""

    def open_fixture(kind: str, **options):
        return open_source(**{**released[kind], **options})

    return open_fixture
