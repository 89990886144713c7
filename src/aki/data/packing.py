"""Packing: rows filled with whole samples, instead of a row a sample and padding.

The documents of a row are kept apart by positions that restart, which is how transformers and the layout read them;
what is left of a row is one more document, of which nothing is learned.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from aki.data.collate import ChatCollator
from aki.layout import IGNORE_INDEX

Row = dict[str, Tensor]
"""A sample or several as model inputs, (1, tokens) each; of media (pixel_values and their like) an entry an item."""

TOKEN_INPUTS = ("input_ids", "prompt_block_ids", "labels")
_TYPES = ("token_type_ids", "mm_token_type_ids")
"""What some families want to be told of each token; 0 is text."""
AXES = "position_axes"
"""Multimodal rotary positions of each token as a row has them, (1, 3, tokens); a batch has them in its position_ids."""
_BY_TOKEN = (*TOKEN_INPUTS, "attention_mask", "position_ids", AXES, *_TYPES)


def first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put items into bins: the longest first, each into the first bin that has room.

    Returns:
        The items of each bin, ascending; bins by their first item, so that long items do not come first.

    Raises:
        ValueError: an item is longer than a bin.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[item] > capacity:
            raise ValueError(
                f"a sample of {lengths[item]} tokens does not fit a packed row of {capacity}: raise row_tokens."
            )
        place = next((i for i, left in enumerate(room) if left >= lengths[item]), None)
        if place is None:
            bins.append([])
            room.append(capacity)
            place = len(bins) - 1
        bins[place].append(item)
        room[place] -= lengths[item]
    return sorted(sorted(items) for items in bins)


def join(samples: Sequence[Row]) -> Row:
    """One row out of samples; the first token of each is no label, because nothing of its own document predicts it."""
    types = {name for name in _TYPES if any(name in sample for sample in samples)}
    samples = [dict.fromkeys(types, torch.zeros_like(sample["input_ids"])) | sample for sample in samples]
    names = [*TOKEN_INPUTS, *sorted(types), *([AXES] if AXES in samples[0] else [])]
    tokens = {name: torch.cat([sample[name] for sample in samples], -1) for name in names}
    lengths = [sample["input_ids"].shape[1] for sample in samples]
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
    tokens["labels"][:, starts] = IGNORE_INDEX
    tokens["position_ids"] = torch.cat([torch.arange(length) for length in lengths])[None]
    return tokens | _media_of(samples)


def _media_of(rows: Sequence[Row]) -> Row:
    """The items of all rows in order, of each kind that any row has."""
    items = [(name, values) for row in rows for name, values in row.items() if name not in _BY_TOKEN]
    return {kind: _stack([values for name, values in items if name == kind]) for kind, _ in items}


def _stack(items: Sequence[Tensor]) -> Tensor:
    """One tensor of all items, those that are smaller than others filled with zeros, as processors fill them."""
    size = torch.tensor([one.shape[1:] for one in items]).amax(0).tolist()
    filled = []
    for one in items:
        # From the last dimension to the second: nothing before, what is missing behind.
        missing = [full - own for own, full in zip(one.shape[:0:-1], size[::-1], strict=True)]
        filled.append(nn.functional.pad(one, [n for behind in missing for n in (0, behind)]))
    return torch.cat(filled)


def with_axes(batch: Row) -> Row:
    """A batch as models with multimodal rotary positions take it: position_ids (4, rows, tokens), the first the text's.

    One without `AXES` stays as it is.
    """
    if AXES not in batch:
        return batch
    positions = torch.cat([batch["position_ids"][None], batch[AXES].transpose(0, 1)])
    return {name: values for name, values in batch.items() if name != AXES} | {"position_ids": positions}


def kinds_of(rows: Sequence[Row]) -> set[str]:
    """The kinds of media that any row has, by the names of their inputs."""
    return {name for row in rows for name in row if name not in _BY_TOKEN}


def items_of(rows: Sequence[Row]) -> dict[str, list[int]]:
    """Of each kind of media that any row has, how many items each of them has."""
    kinds = sorted(kinds_of(rows))
    return {kind: [len(row[kind]) if kind in row else 0 for row in rows] for kind in kinds}


def split_rows(batch: Row, rows: int, items: Mapping[str, Sequence[int]]) -> Iterator[Row]:
    """A batch of rows, each again with its own media.

    Args:
        items: `items_of` the rows.
    """
    media = {kind: batch[kind].split(list(counts)) for kind, counts in items.items()}
    for number in range(rows):
        row = {name: values[number : number + 1] for name, values in batch.items() if name in _BY_TOKEN}
        yield row | {kind: parts[number] for kind, parts in media.items() if len(parts[number])}


@dataclass
class PackedCollator:
    """Rows, packed or of one sample each, to a batch, as long as its longest row."""

    pad_token_id: int

    def __call__(self, rows: Sequence[Row]) -> Row:
        types = {name for name in _TYPES if any(name in row for row in rows)}
        rows = [dict.fromkeys(types, torch.zeros_like(row["input_ids"])) | row for row in rows]
        longest = max(row["input_ids"].shape[1] for row in rows)
        padded = [self._pad(row, longest - row["input_ids"].shape[1]) for row in rows]
        return {name: torch.cat([row[name] for row in padded]) for name in padded[0]} | _media_of(rows)

    def _pad(self, row: Row, missing: int) -> Row:
        fill = {"input_ids": self.pad_token_id, "attention_mask": 0, "prompt_block_ids": -1, "labels": IGNORE_INDEX}
        fill |= dict.fromkeys((*_TYPES, AXES), 0)
        padded = {
            name: nn.functional.pad(row[name], (0, missing), value=value) for name, value in fill.items() if name in row
        }
        if "position_ids" in row:
            padded["position_ids"] = torch.cat([row["position_ids"], torch.arange(missing)[None]], 1)
        return padded


def pack(samples: Sequence[Sequence[Row]], row_tokens: int) -> list[Row]:
    """Rows of up to `row_tokens` tokens that hold all of the samples.

    Args:
        samples: each as one document or several, which stay in one row.
    """
    bins = first_fit_decreasing([sum(row["input_ids"].shape[1] for row in rows) for rows in samples], row_tokens)
    return [join([row for item in items for row in samples[item]]) for items in bins]


class PackedRows(IterableDataset):
    """Endless rows of up to `row_tokens` tokens, from a data set shuffled anew each epoch.

    Samples are taken `buffer` at a time, and the rows of a buffer are yielded before the next is read. The order
    depends on the seed and the number of workers alone, so a run that is resumed by skipping batches sees what it would
    have seen.

    Args:
        dataset: of samples.
        encoders: each makes model inputs of a list of samples; every sample is a document of each, in one row.
        row_tokens: tokens a row may have.
    """

    def __init__(
        self, dataset: Dataset, encoders: Sequence[ChatCollator], row_tokens: int, seed: int = 0, buffer: int = 256
    ):
        self.dataset, self.encoders, self.row_tokens, self.seed, self.buffer = (
            dataset,
            encoders,
            row_tokens,
            seed,
            buffer,
        )

    def __iter__(self) -> Iterator[Row]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for epoch in count():
            generator = torch.Generator().manual_seed(self.seed + epoch)
            order = torch.randperm(len(self.dataset), generator=generator)  # type: ignore[arg-type]
            for chosen in order.split(self.buffer)[first::step]:
                samples = [self._sample(index) for index in chosen.tolist()]
                yield from pack(samples, self.row_tokens)

    def _sample(self, index: int) -> list[Row]:
        sample = self.dataset[index]
        return [encode([sample]) for encode in self.encoders]
