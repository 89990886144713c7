"""What is declared is what is tested: the floors, the newest release, and what a later one is told."""

import os
import re
import subprocess
import sys
import tomllib
import warnings
from importlib import metadata
from pathlib import Path

import pytest
import transformers
from packaging.requirements import Requirement
from packaging.version import Version

from aki.compat import CACHE, NEWEST_TESTED, given_cache, warn_of_untested

ROOT = Path(__file__).parents[1]


def declared() -> dict[str, Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for more in project["optional-dependencies"].values() for line in more)]
    return {requirement.name: requirement for requirement in map(Requirement, lines)}


def test_the_oldest_that_are_tested_are_the_oldest_that_are_declared():
    lines = (ROOT / "constraints-oldest.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    floors = {name: re.search(r">=([\d.]+)", str(requirement)) for name, requirement in declared().items()}
    assert {name: Version(pin) for name, pin in pinned.items()} == {name: Version(floors[name][1]) for name in pinned}


def test_this_release_is_between_the_two():
    assert Version(transformers.__version__) in declared()["transformers"].specifier
    assert Version(transformers.__version__).release[:2] <= Version(NEWEST_TESTED).release


@pytest.mark.parametrize(
    ("release", "warned"),
    [("5.16.1", False), (f"{NEWEST_TESTED}.9", False), ("5.99.0", True), ("5.25.0.dev0", True), ("6.0.0", True)],
)
def test_a_later_release_is_warned_of_and_not_refused(release, warned):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_untested(release)
    sentence = f"tested with transformers up to {NEWEST_TESTED}, this is {release}"
    assert [sentence in str(warning.message) for warning in caught] == [True] * warned


def test_a_cache_is_found_under_either_name():
    cache = transformers.DynamicCache()
    assert given_cache({"cache": cache}) is given_cache({"past_key_values": cache}) is cache
    assert given_cache({"cache": None, "past_key_values": cache}) is cache
    assert given_cache({}) is None


def test_the_cache_has_the_name_that_this_release_gives_it():
    assert ("cache" if Version(metadata.version("transformers")) >= Version("5.24") else "past_key_values") == CACHE


def run(python: Path, command: str, folder: Path) -> None:
    result = subprocess.run(
        [python, ROOT / "tests" / "crossing.py", command, folder],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def transformers_of(python: Path) -> str:
    code = "from importlib import metadata; print(metadata.version('transformers'))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("environment", [".venv-oldest", ".venv-newest"])
def test_what_one_release_writes_another_loads(environment, tmp_path):
    """Saved folders, adapters, the published checkpoint and unlocked models, in both directions, with equal logits."""
    other, this = ROOT / environment / "bin" / "python", Path(sys.executable)
    if not (ROOT / environment / "installed").exists():
        pytest.skip(f"there is no {environment}: make test-oldest and make test-newest make them")
    if transformers_of(other) == transformers.__version__:
        pytest.skip(f"{environment} has transformers {transformers.__version__} too")
    for writer, reader in ((this, other), (other, this)):
        folder = tmp_path / f"by-{transformers_of(writer)}"
        folder.mkdir()
        run(writer, "write", folder)
        run(reader, "read", folder)
