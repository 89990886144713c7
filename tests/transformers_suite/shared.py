"""transformers' shared suites, from its source distribution, which `make suites` fetches; nothing of it is committed.

The distribution holds `tests/test_*.py` alone, so what these import from folders below is put in their place as empty
classes: the suites of generation and of exporters are not run.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections import OrderedDict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import transformers
from transformers.models.auto import modeling_auto

TESTS = Path(__file__).parents[2] / ".transformers" / f"transformers-{transformers.__version__}" / "tests"
_PACKAGE = "transformers_own_tests"
_NOT_DISTRIBUTED: dict[str, dict[str, Any]] = {
    f"{_PACKAGE}.exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    f"{_PACKAGE}.generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    f"{_PACKAGE}.utils.test_configuration_utils": {"config_common_kwargs": {}},
    "fetch_hub_objects_for_ci": {"url_to_local_path": lambda url: url},
}


def suite(name: str) -> ModuleType:
    """One file of `tests`, by its name; where it was not fetched, the tests that want it are skipped."""
    if not TESTS.is_dir():
        pytest.skip("transformers' own tests are not there: `make suites` fetches them", allow_module_level=True)
    pytest.importorskip("parameterized")
    if _PACKAGE not in sys.modules:
        (TESTS / "__init__.py").touch()  # one of the files reads its folder as a package
        package = ModuleType(_PACKAGE)
        package.__path__ = [str(TESTS)]
        sys.modules[_PACKAGE] = package
        for full_name, values in _NOT_DISTRIBUTED.items():
            stand_in = ModuleType(full_name)
            vars(stand_in).update(values)
            sys.modules[full_name] = stand_in
            parent = full_name.rpartition(".")[0]
            if parent and parent not in sys.modules:
                sys.modules[parent] = ModuleType(parent)
        _name_classes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pytest.PytestUnknownMarkWarning)
        return importlib.import_module(f"{_PACKAGE}.{name}")


def _name_classes() -> None:
    """The suites look up by the name of a class what it is for; AKI's are registered at run time, not there."""
    named: list[tuple[OrderedDict, str]] = [
        (modeling_auto.MODEL_MAPPING_NAMES, "AkiModel"),
        (modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, "AkiForConditionalGeneration"),
    ]
    for mapping, name in named:
        mapping["aki"] = name
