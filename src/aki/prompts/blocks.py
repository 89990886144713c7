"""Where the answers are in a tokenised chat, learned from the chat template of any processor or tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from transformers import ProcessorMixin

from aki.layout import IGNORE_INDEX, number_runs
from aki.prompts.scopes import check_scopes, write_scopes

Chat = Sequence[Mapping[str, Any]]
"""Messages, each with its role and content."""

_WORDS = ("alpha", "beta", "gamma", "delta")
_BLANKS = "Ġ▁Ċ \n"
_OWN = "\ufdd1"


@dataclass(frozen=True)
class AnswerMarks:
    """What a chat template writes around an answer, in the tokenizer's own alphabet.

    Strings of tokens are searched instead of ids, because a text may be cut into tokens in several ways at its ends.

    Attributes:
        before: what stands between a question and its answer, for instance "<|im_end|>Ċ<|im_start|>assistantĊ".
        after: what ends an answer or begins the next question.
        kept: how many characters of `after` belong to the answer.
        last: what ends the last answer of a chat, which may be more than that.
        own: tokens of the tokenizer's own that text does not spell, because it was read as text (`plain_text`).
    """

    tokenizer: Any
    before: str
    after: str
    kept: int
    last: str
    own: frozenset[str] = frozenset()

    @classmethod
    def of(cls, processor: Any, told_from_text: bool = False) -> AnswerMarks:
        """Render a small chat and look at what comes around its answers.

        Args:
            processor: a processor or tokenizer with a chat template.
            told_from_text: in the ids to come, text that spells one of the tokenizer's own tokens is no such token.

        Raises:
            ValueError: it has no chat template, or one that marks no answers.
        """
        if isinstance(processor, PromptBlockWriter):
            return processor.marks
        tokenizer = getattr(processor, "tokenizer", processor)
        if getattr(processor, "chat_template", None) is None:
            raise ValueError(
                f"{type(processor).__name__} has no chat template, which says where answers begin: set "
                "`processor.chat_template`, or write prompt_block_ids (or labels of -100 on the prompt) yourself."
            )
        as_parts = isinstance(processor, ProcessorMixin)
        own = frozenset(t for t in tokenizer.get_added_vocab() if t.strip()) if told_from_text else frozenset[str]()
        as_parts = next((form for form in (as_parts, not as_parts) if _renders(processor, form)), as_parts)

        def render(words: tuple[str, ...], **kwargs) -> tuple[str, list[int]]:
            text = processor.apply_chat_template(_chat(words, as_parts), tokenize=False, **kwargs)
            return _join(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"], own)

        first_question, first_answer, question, answer = _WORDS
        chat, ends = render(_WORDS)
        asked, _ = render(_WORDS[:3], add_generation_prompt=True)
        before = _common_start(_between(chat, question, answer), asked.rpartition(question)[2])
        # Templates of models that reason write more before the last answer than before the others.
        before = _common_start(before, _between(chat, first_question, first_answer)).lstrip(_BLANKS)
        next_question, end = _between(chat, first_answer, question), chat.rpartition(answer)[2]
        if not before.strip(_BLANKS) or not next_question.strip(_BLANKS):
            raise ValueError(
                "the chat template writes nothing between a question and its answer by which the answer could be "
                "found: write prompt_block_ids (or labels of -100 on the prompt) yourself."
            )
        ending = _common_start(end, next_question)
        # Two tokens may begin alike, as <|endoftext|> and <|user|>.
        starts = len(chat) - len(end), chat.rindex(first_answer) + len(first_answer)
        while ending and not all(start + len(ending) in ends for start in starts):
            ending = ending[:-1]
        last = ending if next_question.startswith(end) else end
        after = ending if ending.strip(_BLANKS) else next_question
        return cls(tokenizer, before, after, len(ending), last, own)

    def blocks(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, chats: Sequence[Chat] | None = None
    ) -> Tensor:
        """`prompt_block_ids` of shape (batch, length): 0, 1, ... for the prompts between answers, -1 elsewhere.

        Args:
            input_ids: (batch, length).
            attention_mask: (batch, length), 0 is padding.
            chats: the messages of each row, which tell the template's marks from those that a message quotes.

        Raises:
            ValueError: there are more answers than the chat has, or, without chats, than there are questions.
        """
        rows = input_ids.tolist()
        told: Sequence[Chat | None] = [None] * len(rows) if chats is None else chats
        answers = torch.tensor(
            [self._answers(row, number, chat) for number, (row, chat) in enumerate(zip(rows, told, strict=True))],
            dtype=torch.bool,
        )
        prompt = ~answers.to(input_ids.device)
        return number_runs(prompt if attention_mask is None else prompt & attention_mask.bool())

    def _answers(self, ids: list[int], row: int, chat: Chat | None) -> list[bool]:
        text, ends = _join(self.tokenizer, ids, self.own)
        spans, place = self._spans_of(text, chat or [])
        whole = chat is not None and len(chat) > 0 and chat[-1]["role"] == "assistant"
        rest = text.find(self.before, place)
        while rest >= 0:
            start = rest + len(self.before)
            stop = self._end(text, start)
            # What the chat does not account for is the prompt of one more answer, or a text that quotes the mark.
            if not self.own and (whole or text.find(self.before, start, len(text) if chat else stop) >= 0):
                raise ValueError(
                    f"row {row} has more answers than {'questions' if chat is None else 'its chat'}: {self.before!r} "
                    "begins an answer, and a text quotes it. Pass the messages, which decide (apply_chat_template, or "
                    "samples with `messages`), write prompt_block_ids yourself, or leave the sample out."
                )
            spans.append((start, stop))
            rest = text.find(self.before, stop)
        starts = [0, *ends[:-1]]
        return [any(b < stop and e > start for start, stop in spans) for b, e in zip(starts, ends, strict=True)]

    def _spans_of(self, text: str, chat: Chat) -> tuple[list[tuple[int, int]], int]:
        """Where the answers of a chat stand, and where it ends; marks that messages quote are passed over."""
        spans, place = list[tuple[int, int]](), 0
        for message in chat:
            said_ids = self.tokenizer(_said(message), add_special_tokens=False)["input_ids"]
            said, _ = _join(self.tokenizer, said_ids, self.own)
            if message["role"] != "assistant":
                for _ in range(said.count(self.before)):
                    place = max(text.find(self.before, place) + len(self.before), place)
                continue
            found = text.find(self.before, place)
            if found < 0:
                break  # cut off
            start = found + len(self.before)
            place = self._end(text, start, said.count(self.after))
            spans.append((start, place))
        return spans, place

    def _end(self, text: str, start: int, quoted: int = 0) -> int:
        """Where an answer that starts there ends, the marks behind it that belong to it included."""
        after = text.find(self.after, start)
        for _ in range(quoted):
            after = text.find(self.after, after + 1) if after >= 0 else after
        if after < 0:
            return len(text)
        return after + (len(self.last) if text.startswith(self.last, after) else self.kept)


class PromptBlockWriter:
    """A processor or collator whose batches also hold `prompt_block_ids`; in all else it is the one that it wraps.

    As a processor it also takes scopes and tables in chat messages, as AKI's own does.

    Labels on prompts become -100, because what a rule opens must not be learned. Batches that are no tensors (those
    without return_tensors="pt") stay as they are.
    """

    def __init__(self, wrapped: Any, processor: Any):
        self.wrapped = wrapped
        self.marks = AnswerMarks.of(processor)

    def __call__(self, *args, **kwargs) -> Any:
        chats = _chats(args[0]) if args else None  # before the collator changes its samples
        return self._write(self.wrapped(*args, **kwargs), chats)

    def apply_chat_template(self, conversation: Any, *args, **kwargs) -> Any:
        conversation = _with_scopes_written(conversation, self.wrapped)
        batched = bool(conversation) and isinstance(conversation[0], list | tuple)
        written = self.wrapped.apply_chat_template(conversation, *args, **kwargs)
        return self._write(written, conversation if batched else [conversation])

    @property
    def media_token_ids(self) -> list[int]:
        """The placeholders that the processor writes."""
        ids = [getattr(self.wrapped, f"{kind}_token_id", None) for kind in ("image", "video", "audio")]
        return [token_id for token_id in ids if token_id is not None]

    @property
    def media_kinds(self) -> tuple[str, ...]:
        """The types of media parts that the processor's chats may have."""
        prepares = {
            "image": ("image_processor",),
            "video": ("video_processor",),
            "audio": ("feature_extractor", "audio_processor"),
        }
        return tuple(
            kind for kind, parts in prepares.items() if any(getattr(self.wrapped, part, None) for part in parts)
        )

    def __getattr__(self, name: str) -> Any:
        # Unpickling, as in a data loader's workers, asks before there is anything to ask.
        if name == "wrapped":
            raise AttributeError(name)
        return getattr(self.wrapped, name)

    def _write(self, batch: Any, chats: Sequence[Chat] | None) -> Any:
        if not isinstance(batch, MutableMapping) or not isinstance(batch.get("input_ids"), Tensor):
            return batch
        ids, attention = batch["input_ids"], batch.get("attention_mask")
        blocks = self.marks.blocks(ids, attention, chats if chats is not None and len(chats) == len(ids) else None)
        real = torch.ones_like(ids).bool() if attention is None else attention.bool()
        labels = batch.get("labels")
        answered = ((blocks < 0) & real).any(1)
        if labels is not None and not bool(answered.all()):
            raise ValueError(
                f"no answer was found in row {int((~answered).nonzero()[0])} of {len(ids)}: the chat template writes "
                f"{self.marks.before!r} before an answer, which does not stand in its input_ids, or nothing behind it. "
                "Was the chat cut off by max_length, or written by another template?"
            )
        if not bool(answered.any()):
            # A prompt without answers is one block, which is what a rule takes it for.
            return batch
        batch["prompt_block_ids"] = blocks
        if labels is not None:
            batch["labels"] = labels.masked_fill(blocks >= 0, IGNORE_INDEX)
        return batch


def write_prompt_blocks(processor_or_collator: Any, processor: Any = None) -> PromptBlockWriter:
    """Wrap a processor or a collator so that its batches say where the prompts are, and label answers only.

    Args:
        processor_or_collator: called as before; a collator such as TRL's that keeps its `processor` needs nothing else.
        processor: the one with the chat template, where a collator doesn't say.

    Raises:
        ValueError: no processor, or none with a chat template.
    """
    if processor is None:
        is_one = hasattr(processor_or_collator, "apply_chat_template")
        processor = processor_or_collator if is_one else getattr(processor_or_collator, "processor", None)
    if processor is None:
        raise ValueError("this collator doesn't say what its processor is: write_prompt_blocks(collator, processor).")
    return PromptBlockWriter(processor_or_collator, processor)


def _chat(words: tuple[str, ...], as_parts: bool) -> list[dict[str, Any]]:
    contents = [[{"type": "text", "text": word}] if as_parts else word for word in words]
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def _chats(samples: Any) -> list[Chat] | None:
    """The chats of a collator's samples, where all of them say theirs."""
    if not isinstance(samples, list | tuple) or not all(isinstance(sample, Mapping) for sample in samples):
        return None
    chats = [sample.get("messages") or _joined(sample.get("prompt"), sample.get("completion")) for sample in samples]
    return [list(chat) for chat in chats if chat] if chats and all(chats) else None


def _joined(prompt: Any, completion: Any) -> Chat | None:
    return [*prompt, *completion] if isinstance(prompt, list) and isinstance(completion, list) else None


def _said(message: Mapping[str, Any]) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)


def _renders(processor: Any, as_parts: bool) -> bool:
    """Whether a chat template takes the text of a message in this form: some know strings alone, some parts alone."""
    try:
        text = processor.apply_chat_template(_chat(_WORDS, as_parts), tokenize=False)
    except Exception:
        # Templates raise anything.
        return False
    return all(word in text for word in _WORDS) and "'type'" not in text


def _with_scopes_written(conversation: list, processor: Any) -> list:
    """A chat, or a list of them, whose scopes are tokens."""
    if not conversation:
        return conversation
    batched = isinstance(conversation[0], list | tuple)
    chats = [[_message(message) for message in chat] for chat in (conversation if batched else [conversation])]
    check_scopes(chats, processor)
    return chats if batched else chats[0]


def _message(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    return {**message, "content": list(write_scopes(content))} if isinstance(content, list) else message


def _join(tokenizer: Any, ids: list[int], own: frozenset[str]) -> tuple[str, list[int]]:
    """The tokens as one string, and where each ends in it. Those in `own` stand behind a letter that no text has."""
    text, ends = "", []
    for token in tokenizer.convert_ids_to_tokens(ids):
        text += f"{_OWN}{token}" if token in own else token or ""
        ends.append(len(text))
    return text, ends


def _between(text: str, left: str, right: str) -> str:
    return text.rpartition(left)[2].partition(right)[0]


def _common_start(left: str, right: str) -> str:
    return "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))
