"""Every family's parameters by AKI's names of the parts."""

from __future__ import annotations

import pytest
from attention.unlock_families import FAMILIES

from aki.models.other import parameters_of


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_in_one_part_and_no_part_is_empty(family):
    model = FAMILIES[family]().model
    parts = parameters_of(model)
    assert all(parts.values()), {name: len(held) for name, held in parts.items()}
    held = [id(parameter) for part in parts.values() for parameter in part]
    assert sorted(held) == sorted(id(parameter) for parameter in model.parameters())
