"""What differs between the releases of transformers that aki runs under; nothing else asks which one it is.

Each name says why it is there and the release from which, once it is the oldest declared, it can go.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from packaging.version import Version
from transformers import Cache, __version__
from transformers.modeling_outputs import CausalLMOutputWithPast

NEWEST_TESTED = "5.24"
"""The newest minor release that `make test-newest` has passed under; the oldest stands in pyproject.toml."""


def warn_of_untested(release: str = __version__) -> None:
    """Say so where transformers is newer than what was tested; it may do all the same."""
    if Version(release).release[:2] > Version(NEWEST_TESTED).release:
        warnings.warn(
            f"aki was tested with transformers up to {NEWEST_TESTED}, this is {release}: if something fails, install "
            f"'transformers=={NEWEST_TESTED}.*'.",
            stacklevel=2,
        )


warn_of_untested()


# 5.24 calls a model's cache `cache`; before it was `past_key_values`, which 5.24 to 5.39 still take from a caller.
# CACHE can go with 5.24, the old name with 5.40.
CACHE_NAMES = ("cache", "past_key_values")
CACHE = next(name for name in CACHE_NAMES if name in {field.name for field in fields(CausalLMOutputWithPast)})


def given_cache(inputs: Mapping[str, Any]) -> Cache | None:
    """The cache among a model's inputs, whichever its name: hooks see what the caller wrote. Can go with 5.40."""
    return next((inputs[name] for name in CACHE_NAMES if inputs.get(name) is not None), None)


# SigLIP's model read this field of its configuration before the configuration declared it, in 5.23. Can go with 5.23.
UNDECLARED_FIELDS = {"siglip_vision_model": ("vision_use_head",)}
