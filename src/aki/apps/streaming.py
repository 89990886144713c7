"""An answer as it is generated."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Event, Thread
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, TextIteratorStreamer

from aki.models.explain import chat_inputs


class Answer:
    """The greedy answer to a chat: iterate over its pieces, once.

    Whoever stops iterating early calls `stop`, which returns when the model is free again.

    Attributes:
        ids: (tokens,), what was generated, once the pieces are at an end.
    """

    def __init__(self, model: Any, processor: Any, messages: list[dict[str, Any]], max_new_tokens: int = 128):
        """
        Raises:
            ValueError: the model has no room for the prompt, or the chat template none for the chat.
            ImageError: a picture cannot be read.
        """
        self.ids = torch.empty(0, dtype=torch.long)
        self.inputs = chat_inputs(processor, messages).to(model.device)
        tokenizer = getattr(processor, "tokenizer", processor)
        self._streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._stopped = Event()
        self._failure: BaseException | None = None
        self._thread = Thread(target=self._generate, args=(model, max_new_tokens), daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[str]:
        begun = False
        for piece in self._streamer:
            piece = piece if begun else piece.lstrip()
            begun = begun or bool(piece)
            if piece:
                yield piece
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """End the answer where it is."""
        self._stopped.set()
        self._thread.join()

    def _generate(self, model: Any, max_new_tokens: int) -> None:
        try:
            out = model.generate(
                **self.inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                streamer=self._streamer,
                stopping_criteria=[_When(self._stopped)],
            )
            self.ids = out[0, self.inputs["input_ids"].shape[1] :]
        except BaseException as error:
            self._failure = error
            self._streamer.end()


class _When(StoppingCriteria):
    def __init__(self, event: Event):
        self.event = event

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)
