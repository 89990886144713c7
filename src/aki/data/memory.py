"""Batches that are made once and then remembered: the rows of a comparison are shown the same ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset

from aki.data.schema import Sample

Memory = dict[tuple[str, tuple[int, ...]], Any]


@dataclass
class Batches:
    """Indices of a data set to a batch; a collator for a loader that draws indices.

    Attributes:
        collate: makes a batch of samples. What it gives must not be changed by who gets it.
        name: of everything that a batch depends on beside the indices.
        memory: what was made before; None makes each batch anew.
    """

    dataset: Dataset[Sample]
    collate: Callable[[Sequence[Sample]], Any]
    name: str = ""
    memory: Memory | None = None

    def __call__(self, indices: Sequence[int]) -> Any:
        key = (self.name, tuple(indices))
        if self.memory is None:
            return self._make(indices)
        if key not in self.memory:
            self.memory[key] = self._make(indices)
        return self.memory[key]

    def _make(self, indices: Sequence[int]) -> Any:
        return self.collate([self.dataset[index] for index in indices])
