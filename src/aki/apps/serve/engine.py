"""The model that is served, and what a request becomes for it."""

from __future__ import annotations

import copy
from pathlib import Path
from threading import Lock
from typing import Any

from jinja2 import TemplateError
from torch import Tensor

from aki.apps.loading import load
from aki.apps.serve.limits import Limits, Refused
from aki.apps.serve.schema import ChatRequest
from aki.models import AkiProcessor
from aki.models.plain_text import as_text

_TEMPLATE = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}


class Engine:
    """A model with its processor.

    Attributes:
        name: what clients call it.
        context: tokens of prompt and answer together; None if the model doesn't say.
        batch_context: the same for requests that are answered together.
        end_tokens: each of them ends an answer.
    """

    def __init__(self, name: str, model: Any, processor: Any):
        self.name, self.model, self.processor = name, model.eval(), processor
        self.tokenizer = processor.tokenizer
        if getattr(self.tokenizer, "backend_tokenizer", None) is None:
            raise ValueError(f"the tokenizer of {name} is a slow one: save it as tokenizer.json, which serving needs.")
        text = model.config.get_text_config(decoder=True)
        self.context: int | None = getattr(text, "max_position_embeddings", None)
        # Beyond this a longrope model computes all rows of a batch in another way.
        self.batch_context: int | None = getattr(text, "original_max_position_embeddings", None) or self.context
        ends = model.generation_config.eos_token_id
        self.end_tokens = frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])
        pads = [self.tokenizer.pad_token_id, *sorted(self.end_tokens), 0]
        self.pad_token_id = next(pad for pad in pads if pad is not None)
        self._longest_token = max(map(len, self.tokenizer.get_vocab()))
        # A processor is not for several threads at once, and text must not wait while pictures go through one.
        self._processors = {False: (processor, Lock()), True: (copy.deepcopy(processor), Lock())}

    @classmethod
    def from_folder(cls, folder: str, unlocked: bool) -> Engine:
        """Load an AKI model, or any multimodal one of transformers with a rule laid over it.

        Weights are safetensors, and no code from the folder is run.

        Args:
            unlocked: unlock a model that was not saved unlocked.

        Raises:
            ValueError, OSError: nothing there that can be served.
        """
        model, processor = load(folder, unlocked)
        return cls(Path(folder).resolve().name, model, processor)

    def inputs(self, chat: ChatRequest, images: list[Any]) -> dict[str, Tensor]:
        """What the model takes, a batch of one, on the CPU.

        Raises:
            Refused: the processor or its chat template won't have this chat.
        """
        self._check_length(sum(map(len, chat.texts())))
        # Others write the tokens that begin a text into their template, or leave them to the tokenizer.
        own = {"processor_kwargs": {"add_special_tokens": False}} if isinstance(self.processor, AkiProcessor) else {}
        processor, lock = self._processors[bool(images)]
        try:
            with lock, as_text(processor, chat.chat(images)) as messages:
                return dict(processor.apply_chat_template(messages, **_TEMPLATE, **own))
        except (ValueError, TemplateError) as error:
            raise _refused(f"the chat cannot be made into a prompt: {error}") from error

    def check_name(self, name: str) -> None:
        """
        Raises:
            Refused: a client asks for another model.
        """
        if name != self.name:
            message = f"this server has the model {self.name!r}, not {name[:100]!r}."
            raise Refused(404, message, "model_not_found", "model")

    def _check_length(self, characters: int) -> None:
        """A text that cannot fit is refused before it is made into tokens, which takes its time and the tokenizer."""
        if self.context is not None and characters > self.context * self._longest_token:
            message = f"the text has {characters} characters, and the model room for {self.context} tokens."
            raise Refused(400, message, "context_length_exceeded", "messages")

    def new_tokens(self, chat: ChatRequest, prompt: int, limits: Limits) -> int:
        """How many tokens the answer may have.

        Raises:
            Refused: more were asked for than there is room.
        """
        param, asked = chat.asked_tokens
        if asked is not None and asked > limits.max_tokens:
            message = f"{asked} new tokens were asked for, this server gives up to {limits.max_tokens}."
            raise Refused(400, message, "too_many_tokens", param)
        room = limits.max_tokens if self.context is None else min(self.context - prompt, limits.max_tokens)
        if room < (asked or 1):
            message = f"the prompt has {prompt} tokens, and with the answer the model has room for {self.context}."
            raise Refused(400, message, "context_length_exceeded", "messages")
        return asked or room


def _refused(message: str) -> Refused:
    return Refused(400, message, "invalid_prompt", "messages")
