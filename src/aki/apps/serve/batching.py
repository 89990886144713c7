"""Requests that come together are answered together, by one `generate`.

Each row of the batch has its own sampling, stop strings and number of tokens, and ends when its client hangs up; the
thread here is the only one that calls the model.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Condition, Thread
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, StoppingCriteria

from aki.apps.serve.engine import Engine
from aki.apps.serve.job import Event, Job
from aki.apps.serve.limits import Limits, Refused, unable

logger = logging.getLogger(__name__)

STUCK = 300
"""Seconds without a step of the model after which it counts as one that cannot answer. The first step reads all
prompts of a batch, which takes minutes where a large model has no accelerator."""
WAIT = 0.03
"""Seconds at most that a batch waits for requests which are being read; with none on their way it starts at once."""

Deliver = Callable[[list[tuple[Job, Event]]], None]

_PADS = {"attention_mask": 0, "prompt_block_ids": -1}


class Batcher:
    """The queue before the model.

    Args:
        on_batch: told how many requests each batch has, from the model's thread.
    """

    def __init__(self, engine: Engine, limits: Limits, on_batch: Callable[[int], None] = lambda size: None):
        self.engine, self.limits, self.on_batch = engine, limits, on_batch
        self.waiting: deque[Job] = deque()
        self.coming = 0
        self.pictures = 0
        self._step: float | None = None
        self._changed, self._closed = Condition(), False
        self._loop = asyncio.get_running_loop()
        self._thread = Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether somebody is there to answer, and has not been within one step of the model for `STUCK` seconds."""
        step = self._step
        return self._thread.is_alive() and not self._closed and (step is None or time.monotonic() - step < STUCK)

    @contextmanager
    def place(self, pictures: bool = False) -> Iterator[None]:
        """A place in the queue for a request that is being read.

        Args:
            pictures: whether it has any. Such requests leave a quarter of the places to others.

        Raises:
            Refused: the queue is full, or nobody is there to answer.
        """
        most = self.limits.max_waiting
        for_pictures = max(1, most - max(1, most // 4))
        with self._changed:
            if not self.alive:
                raise unable()
            held = self.pictures + sum(job.pictures for job in self.waiting)
            if len(self.waiting) + self.coming >= most or (pictures and held >= for_pictures):
                what = f"{most} requests" if len(self.waiting) + self.coming >= most else f"{held} requests with images"
                message = f"{what} are waiting already: try again later."
                raise Refused(429, message, "queue_full", headers={"Retry-After": "1"})
            self.coming += 1
            self.pictures += pictures
        try:
            yield
        finally:
            with self._changed:
                self.coming -= 1
                self.pictures -= pictures
                self._changed.notify()

    def submit(self, job: Job) -> None:
        """
        Raises:
            Refused: the model's thread has ended.
        """
        with self._changed:
            if not self.alive:
                raise unable()
            self.waiting.append(job)
            self._changed.notify()

    def drop(self, job: Job) -> None:
        """Nobody waits for this answer any more: it ends if it is begun, and leaves the queue if it is not."""
        with self._changed:
            job.cancelled = True
            if job in self.waiting:
                self.waiting.remove(job)

    def close(self) -> None:
        """Let the batch that runs come to its end, and stop."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        batch: list[Job] = []
        try:
            while self._await_work():
                batch = self._next_batch()
                self._answer(batch)
                self._step = None
        finally:  # Whatever ended this thread, nobody must wait for it.
            with self._changed:
                self._closed, left = True, [job for job in [*batch, *self.waiting] if job.finish is None]
                self.waiting.clear()
            self._deliver([(job, RuntimeError("the model's thread has ended")) for job in left])

    def _await_work(self) -> bool:
        """Whether there is any; False when closed and nothing is left."""
        with self._changed:
            self._changed.wait_for(lambda: self.waiting or self._closed)
            until = time.monotonic() + WAIT
            while self.coming and len(self.waiting) < self.limits.max_batch and time.monotonic() < until:
                self._changed.wait(until - time.monotonic())
            return not self._closed or bool(self.waiting)

    def _next_batch(self) -> list[Job]:
        """The oldest request and those that can go with it; none where all have hung up meanwhile."""
        with self._changed:
            batch: list[Job] = []
            for job in list(self.waiting):
                if len(batch) < self.limits.max_batch and fit_together([*batch, job], self.engine.batch_context):
                    batch.append(job)
                    self.waiting.remove(job)
            return batch

    def _answer(self, batch: list[Job]) -> None:
        batch = [job for job in batch if not job.cancelled and job.finish is None]
        if not batch:
            return
        self._stepped()
        try:
            self.on_batch(len(batch))
            self._generate(batch)
        except Exception as error:
            logger.exception("a batch of %d failed", len(batch))
            if len(batch) > 1 and not any(job.tokens for job in batch):
                # One bad request must not take the others with it.
                for job in batch:
                    self._answer([job])
            else:
                self._deliver([(job, error) for job in batch if job.finish is None])

    def _generate(self, batch: list[Job]) -> None:
        model = self.engine.model
        inputs = collate([job.inputs for job in batch], self.engine.pad_token_id)
        model.generate(
            **{name: _placed(value, model) for name, value in inputs.items()},
            max_new_tokens=max(job.max_tokens for job in batch),
            do_sample=False,  # rows that sample do so in _OwnSampling
            num_beams=1,
            # A model's own penalties would count a row's padding, and so depend on who else asks.
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            pad_token_id=self.engine.pad_token_id,
            logits_processor=[_OwnSampling(batch, self._deliver)],
            stopping_criteria=[_Rows(batch, self._deliver, self._stepped)],
        )

    def _stepped(self) -> None:
        self._step = time.monotonic()

    def _deliver(self, events: list[tuple[Job, Event]]) -> None:
        try:
            self._loop.call_soon_threadsafe(_hand_out, events)
        except RuntimeError:  # The server is gone, and the clients with it.
            logger.debug("nobody is there for %d events", len(events))


def _hand_out(events: list[tuple[Job, Event]]) -> None:
    for job, event in events:
        job.events.put_nowait(event)


class _OwnSampling(LogitsProcessor):
    """Leaves a row that samples the token that it drew, so that all rows can go on greedily."""

    def __init__(self, jobs: list[Job], deliver: Deliver):
        self._jobs, self._deliver = jobs, deliver

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        for row, job in enumerate(self._jobs):
            if job.sampler is not None and job.finish is None:
                try:
                    token = job.sampler.draw(input_ids[row], scores[row])
                except Exception as error:
                    self._deliver([(job, job.fail(error))])
                    continue
                scores[row] = -torch.inf
                scores[row, token] = 0.0
        return scores


class _Rows(StoppingCriteria):
    """Hands each row its new token, and stops the rows that are at their end or that failed, those alone."""

    def __init__(self, jobs: list[Job], deliver: Deliver, stepped: Callable[[], None]):
        self._jobs, self._deliver, self._stepped = jobs, deliver, stepped

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs) -> Tensor:
        self._stepped()
        events: list[tuple[Job, Event]] = []
        for job, token in zip(self._jobs, input_ids[:, -1].tolist(), strict=True):
            if job.finish is None:
                try:
                    events += [(job, event) for event in job.take(token)]
                except Exception as error:
                    events.append((job, job.fail(error)))
        if events:
            self._deliver(events)
        return torch.tensor([job.finish is not None for job in self._jobs], device=input_ids.device)


def fit_together(jobs: list[Job], context: int | None) -> bool:
    """Whether these requests can be one batch: the same inputs of the same sizes, and short enough when padded.

    Padded prompts and the longest answer must fit the context, beyond which models compute positions in another way.
    """
    if len(jobs) == 1:
        return True
    length = max(job.prompt_tokens for job in jobs) + max(job.max_tokens for job in jobs)
    return len({job.sizes for job in jobs}) == 1 and (context is None or length <= context)


def collate(rows: list[dict[str, Tensor]], pad_token_id: int) -> dict[str, Tensor]:
    """Rows that fit together as one batch: what stands beside tokens is padded on the left, media are joined in order.

    Args:
        rows: each with input_ids (1, length), others of that shape, and media (items, ...).
    """
    if len(rows) == 1:
        return rows[0]
    length = max(row["input_ids"].shape[1] for row in rows)
    pads = {**_PADS, "input_ids": pad_token_id}
    batch: dict[str, list[Tensor]] = {name: [] for name in rows[0]}
    for row in rows:
        shape = row["input_ids"].shape
        for name, value in row.items():
            left = (length - shape[1], 0) if value.shape == shape else None
            batch[name].append(value if left is None else nn.functional.pad(value, left, value=pads.get(name, 0)))
    return {name: torch.cat(values) for name, values in batch.items()}


def _placed(value: Tensor, model: Any) -> Tensor:
    return value.to(model.device, model.dtype) if value.is_floating_point() else value.to(model.device)
