"""Rules, connectors and sources of a user's own: Python files that put them where ours are, in RULES, CONNECTORS and
SOURCES. No fork, no package."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

VARIABLE = "AKI_PLUGINS"
"""The files, for processes that this one starts, and for programs that `import aki`; separated as PATH is."""


class PluginError(ValueError):
    """A file that is no plugin."""


def load(files: Iterable[str | Path]) -> None:
    """Run each file once in this process, and in each that is started from here on (and imports aki).

    Raises:
        PluginError: it is not there, or it fails; why is said.
    """
    for file in map(_absolute, files):
        _run(file)
        known = _known()
        if str(file) not in known:
            os.environ[VARIABLE] = os.pathsep.join([*known, str(file)])


def load_from_environment() -> None:
    """Those that whoever started this process has loaded."""
    load(_known())


def _known() -> list[str]:
    return [one for one in os.environ.get(VARIABLE, "").split(os.pathsep) if one]


def _absolute(file: str | Path) -> Path:
    path = Path(file).resolve()
    if path.suffix != ".py" or not path.is_file():
        raise PluginError(f"there is no plugin {file}: name a Python file.")
    return path


def _run(file: Path) -> None:
    # A name by which what it defines is found again, and that no package has.
    name = f"aki_plugin_{file.stem}"
    if (there := sys.modules.get(name)) is not None:
        if there.__file__ != str(file):
            raise PluginError(f"two plugins are called {file.name}, {there.__file__} and {file}: rename one.")
        return
    spec = spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise PluginError(f"the plugin {file} failed: {type(error).__name__}: {error}") from error
