"""Which rows of a step are done again, and doing it in each layer. One `Steps` a worker."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from aki.attention import varlen
from aki.vllm.cache import Pages, read
from aki.vllm.prompts import Prompt, PromptReader
from aki.vllm.rows import Rows, attend, takes_segments

Past = dict[int, tuple[Tensor, Tensor]]
"""A request's place in the batch -> its keys and values of earlier steps, (tokens, key heads, width) both."""


class Steps:
    """What a worker knows of its requests, from what the scheduler tells it.

    Args:
        reader: of prompts.
        order: the requests of the step that is being computed, as their tokens stand in it.
    """

    def __init__(self, reader: PromptReader, order: Callable[[], Sequence[str]]):
        self.reader, self.order = reader, order
        self.layers: list[str] = []
        self.pages: dict[str, Pages] = {}
        self.prompts: dict[str, Prompt] = {}
        self.unfinished: set[str] = set()
        self.starts: dict[str, int] = {}
        self.counts: dict[str, int] = {}
        self.is_open = False
        self.rows: list[Rows] | None = None
        self.masks: dict[tuple[int, int | None], Tensor] = {}
        self.calls: tuple[varlen.Call, ...] | None = None
        self.done = 0

    @contextmanager
    def step(self, scheduled: Any) -> Iterator[None]:
        """While a step is computed.

        Raises:
            RuntimeError: a layer was computed without its rows, which would have been a causal answer.
        """
        self._begin(scheduled)
        try:
            yield
            if self.is_open and self.done != len(self.layers):
                raise RuntimeError(
                    f"{len(self.layers) - self.done} of {len(self.layers)} attention layers were computed past the "
                    "attention rule, so this step would have been answered causally: vLLM ran them in a way that aki "
                    "does not know (a CUDA graph over mixed batches, for instance). Start it with --enforce-eager."
                )
        finally:
            self.is_open = False

    def _begin(self, scheduled: Any) -> None:
        for gone in scheduled.finished_req_ids:
            self.prompts.pop(gone, None)
            self.unfinished.discard(gone)
        for new in scheduled.scheduled_new_reqs:
            if new.prompt_token_ids is not None:
                self._take(new)
        known = scheduled.scheduled_cached_reqs
        self.unfinished |= {name for name in known.resumed_req_ids if name in self.prompts}
        self.starts = {new.req_id: new.num_computed_tokens for new in scheduled.scheduled_new_reqs}
        self.starts |= dict(zip(known.req_ids, known.num_computed_tokens, strict=True))
        self.counts = scheduled.num_scheduled_tokens
        self.is_open, self.rows, self.done = False, None, 0
        self.masks.clear()
        self.calls = None
        for name in [name for name in self.unfinished if name in self.counts]:
            start, last = self.starts[name], self.prompts[name].openings[-1].stop
            self.is_open |= start < last
            if start + self.counts[name] >= last:
                self.unfinished.discard(name)

    def _take(self, new: Any) -> None:
        prompt = self.reader.read(new.prompt_token_ids, *request_inputs(new))
        self.prompts.pop(new.req_id, None)
        if prompt.openings:
            self.prompts[new.req_id] = prompt
            self.unfinished.add(new.req_id)

    def _find_rows(self) -> list[Rows]:
        found, offset = [], 0
        for row, name in enumerate(self.order()):
            start, count = self.starts[name], self.counts[name]
            for opening in self.prompts[name].openings if name in self.prompts else ():
                first, stop = max(opening.first, start), min(opening.stop, start + count)
                if first >= stop:
                    continue
                if opening.reach > start + count:
                    raise RuntimeError(
                        f"a prompt was cut at token {start + count} although token {stop - 1} of it sees as far as "
                        f"token {opening.reach - 1}: the scheduler did not ask aki where it may be cut."
                    )
                queries = slice(offset + first - start, offset + stop - start)
                found.append(Rows(queries, slice(offset, offset + count), start, row, opening, first))
            offset += count
        return found

    def redo(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        metadata: Any,
        output: Tensor,
    ) -> None:
        """Write the rows of one layer over what its own kernel gave.

        Args:
            query: (tokens, heads, width); key, value: (tokens, key heads, width); output: as query.
        """
        if self.rows is None:
            self.rows = self._find_rows()
        past: dict[int, tuple[Tensor, Tensor]] = {}
        for rows in self.rows:
            if rows.cached and rows.row not in past:
                table = metadata.block_table[rows.row]
                past[rows.row] = read(self.pages[layer.layer_name], layer, kv_cache, table, rows.cached)
        window = getattr(layer, "sliding_window", None)
        if takes_segments(layer.impl, window, query, value):
            self._in_one_call(layer.impl.scale, query, key, value, past, output)
        else:
            self._one_by_one(layer.impl, window, query, key, value, past, output)
        self.done += 1

    def _in_one_call(self, scale: float, query: Tensor, key: Tensor, value: Tensor, past: Past, output: Tensor) -> None:
        """All rows of the step that are causal among themselves in one call, all others in a second."""
        if past:
            key, value = (torch.cat([x, *(pair[i] for pair in past.values())]) for i, x in enumerate((key, value)))
        if self.calls is None:
            self.calls = self._segment_calls(past, query, key)
        for call in self.calls:
            varlen.write(varlen.FLASH, query, key, value, call, scale, output)

    def _segment_calls(self, past: Past, query: Tensor, key: Tensor) -> tuple[varlen.Call, ...]:
        lengths = [len(keys) for keys, _ in past.values()]
        starts = dict(zip(past, accumulate(lengths, initial=len(key) - sum(lengths)), strict=False))
        found = tuple(rows.segment(starts.get(rows.row, 0)) for rows in self.rows or ())
        return varlen.calls(found, (1, len(query), len(key)), query.device)

    def _one_by_one(
        self,
        impl: Any,
        window: int | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        past: Past,
        output: Tensor,
    ) -> None:
        for place, rows in enumerate(self.rows or ()):
            own = [key[rows.tokens], value[rows.tokens]]
            if rows.row in past:
                own = [torch.cat(pair) for pair in zip(past[rows.row], own, strict=True)]
            keys, values = (torch.cat([x[slice(*span)] for span in rows.keys]) for x in own)
            mask = self.masks.get((place, window))
            if mask is None:
                mask = self.masks[place, window] = rows.mask(window, query.device)
            output[rows.queries] = attend(impl, query[rows.queries], keys, values, mask)


def request_inputs(request: Any) -> tuple[list[tuple[Tensor, str]], str | None]:
    """The pictures, videos and clips of a request of vLLM, and its adapter, as `PromptReader.read` takes them."""
    items = []
    for feature in request.mm_features:
        place = feature.mm_position
        positions = torch.arange(place.offset, place.offset + place.length)
        items.append((positions if place.is_embed is None else positions[place.is_embed.bool()], feature.identifier))
    adapter = request.lora_request
    return items, None if adapter is None else adapter.lora_path
