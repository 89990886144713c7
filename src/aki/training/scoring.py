"""Exact match, without decoding token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset

from aki.data.memory import Batches, Memory
from aki.data.schema import Sample
from aki.layout import IGNORE_INDEX
from aki.models.other import takes_logits_to_keep
from aki.training.predictions import group_of, summary
from aki.training.trainer import supervised_positions


def answered_right(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """(batch,) bool: see `all_foretold`."""
    return all_foretold(*logits_of_labels(model, batch))


@torch.no_grad()
def logits_of_labels(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(batch, positions, vocabulary) logits and (batch, positions) labels, where any row has a label."""
    inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
    labels = inputs.pop("labels")[:, 1:]
    kept = supervised_positions(batch["labels"]).to(model.device)
    if takes_logits_to_keep(model):
        logits = model(**inputs, logits_to_keep=kept).logits
    else:
        logits = model(**inputs).logits[:, kept]
    return logits, labels[:, kept]


def all_foretold(logits: Tensor, labels: Tensor) -> Tensor:
    """(batch,) bool: whether greedy decoding gives each row's labels, to the last token.

    Greedy decoding follows the labels exactly as long as every label is the most likely token after those before it, so
    one forward over the labelled answer tells.
    """
    return ((logits.argmax(-1) == labels) | (labels == IGNORE_INDEX)).all(1)


def log_likelihoods(logits: Tensor, labels: Tensor) -> Tensor:
    """(batch,) the sum of the log-probabilities of each row's labels, in nats."""
    losses = cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="none")
    return -losses.view_as(labels).sum(1)


def answers_right(
    model: Any,
    collator: Callable[[Sequence[Sample]], dict[str, Tensor]],
    dataset: Dataset,
    batch_size: int = 300,
    name: str = "",
    memory: Memory | None = None,
) -> list[tuple[bool, str]]:
    """Of each question, whether it is answered right, and its skill (or source, where a sample has no skill).

    Args:
        name, memory: see `Batches`.
    """
    was_training = model.training
    model.eval()
    found: list[tuple[bool, str]] = []
    size = len(dataset)  # type: ignore[arg-type]
    batches = Batches(dataset, lambda samples: ([group_of(s) for s in samples], collator(samples)), name, memory)
    for start in range(0, size, batch_size):
        skills, batch = batches(range(start, min(start + batch_size, size)))
        found += zip(answered_right(model, batch).tolist(), skills, strict=True)
    model.train(was_training)
    return found


def accuracy_by_skill(
    model: Any, collator: Callable[[Sequence[Sample]], dict[str, Tensor]], dataset: Dataset, **options: Any
) -> dict[str, float]:
    """The share answered right of each skill (or source, where a sample has no skill), and of all, 0 to 1.

    Args:
        options: as `answers_right` takes them.

    Returns:
        `accuracy`, that of all, and each skill's.
    """
    return summary(answers_right(model, collator, dataset, **options))
