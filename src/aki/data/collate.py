"""Samples to batches, through the processor that inference uses too."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from random import Random
from typing import Any

import torch
from torch import Tensor

from aki.data.fast import FastInputs, fast_inputs
from aki.data.plain import as_sample
from aki.data.report import BadSample, Reason
from aki.data.schema import Sample
from aki.data.split import split_captions
from aki.layout import IGNORE_INDEX
from aki.models.answers import labels_from_prompt_blocks
from aki.models.clips import ClipError, frames_as_given, open_audio, open_video
from aki.models.images import ImageError, open_image
from aki.models.processing import AkiProcessor
from aki.prompts.blocks import PromptBlockWriter
from aki.prompts.scopes import SCOPE_PARTS, scope_token_ids

MIN_SIDE, MAX_ASPECT = 4, 100
"""Pixels that a picture's sides must have, and how many times as long as the other one may be."""

Inputs = Callable[[Sequence[Sample]], dict[str, Tensor]]


@dataclass
class ChatCollator:
    """Turns samples into model inputs with labels on the answers, padded on the right.

    Samples may be plain dicts too, `{"messages": [{"role": ..., "content": [...]}, ...], "images": [...]}` in the form
    of Hugging Face's chat templates (`aki.data.plain.as_sample`); of those, `collator(samples)` opens the pictures
    and refuses what it cannot use.

    A sample longer than max_length loses the tail of its answer. What asks and is then not answered goes too, so a cut
    never stands in a question or among an image's placeholders.

    Attributes:
        processor: AKI's, or another model's in `aki.write_prompt_blocks`.
        template: name of the processor's chat template; None is its default.
        max_length: tokens a sample may have, placeholders of images included.
        seen: of captions, the largest share that the picture may see (`aki.data.split`); 0 is none.
        causal: no prompt blocks, so that no rule opens any text.
        seed: of what is drawn.
        raw_pixels: `encode` leaves pictures as bytes, which the trainer normalises on the model's device.
    """

    processor: AkiProcessor | PromptBlockWriter
    max_length: int
    template: str | None = None
    seen: float = 0.0
    causal: bool = False
    seed: int = 0
    raw_pixels: bool = False
    special: re.Pattern[str] = field(init=False, repr=False)
    fast: FastInputs | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        tokens = {token.content for token in self.processor.tokenizer.added_tokens_decoder.values()}
        self.special = re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")
        self.fast = fast_inputs(self.processor, self.template)

    def encode(self, sample: Sample | Mapping[str, Any]) -> tuple[dict[str, Tensor], bool]:
        """One sample as a batch of its own, and whether its answer lost its tail.

        Raises:
            BadSample: a picture that is missing, broken or of an absurd size, a special token written in a text, or a
                length that leaves nothing of the answer.
        """
        sample = as_sample(sample)
        try:
            batch, shortened = self._encode([self.opened(sample)], self._fast_inputs)
        except BadSample as bad:
            raise BadSample(bad.reason, bad.detail, sample.source, sample.id) from bad.__cause__
        except ClipError as error:
            raise BadSample("broken clip", str(error), sample.source, sample.id) from error
        return batch, shortened[0]

    def opened(self, sample: Sample) -> Sample:
        """The sample with its pictures opened.

        Raises:
            BadSample: a picture that is missing, broken or of an absurd size, or a special token written in a text.
        """
        messages = [
            {**message, "content": [self._part(part) for part in message["content"] if self._says(part)]}
            for message in sample.messages
        ]
        return replace(sample, messages=messages)

    def __call__(self, samples: Sequence[Sample | Mapping[str, Any]]) -> dict[str, Tensor]:
        """
        Returns:
            what the model takes, with `labels` (samples, tokens), which are IGNORE_INDEX wherever nothing is learned.

        Raises:
            BadSample: a sample's length leaves nothing of its answer; or a dict is no chat, or as `encode`.
        """
        whole = [one if isinstance(one, Sample) else self.opened(as_sample(one)) for one in samples]
        return self._encode(whole, self._inputs)[0]

    def _says(self, part: dict[str, Any]) -> bool:
        """Scopes say nothing to a model without their tokens, which is none that a rule with scopes trains."""
        return part not in SCOPE_PARTS or scope_token_ids(self.processor) is not None

    def _part(self, part: dict[str, Any]) -> dict[str, Any]:
        """A part of a message with its picture opened.

        Raises:
            BadSample: it cannot be used.
        """
        if part["type"] != "text" and part["type"] not in self.processor.media_kinds:
            taken = ", ".join(self.processor.media_kinds)
            raise BadSample(f"{part['type']} not taken", f"the model's processor takes {taken} alone.")
        if part["type"] == "image":
            return {"type": "image", "image": _picture(part["image"])}
        if part["type"] == "video" and not isinstance(part["video"], str):
            return {"type": "video", "video": _frames(part["video"])}
        if part["type"] == "audio":
            return {"type": "audio", "audio": open_audio(part["audio"], self.processor.feature_extractor.sampling_rate)}
        if part in SCOPE_PARTS:
            return part
        found = self.special.search(part.get("text", ""))
        if found:
            raise BadSample("special token in a text", f"{found[0]!r} would be read as the chat's own.")
        return part

    def _inputs(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        chats = [sample.messages for sample in samples]
        options = {"padding": True, "padding_side": "right", "add_special_tokens": False, **frames_as_given(chats)}
        return dict(
            self.processor.apply_chat_template(
                chats,
                chat_template=self.template,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs=options,
            )
        )

    def _fast_inputs(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Of one sample, the fast way where there is one for what it holds."""
        (sample,) = samples
        kinds = {part["type"] for message in sample.messages for part in message["content"]}
        if self.fast is None or not kinds <= {"text", "image"}:
            return self._inputs(samples)
        return self.fast(sample.messages, self.raw_pixels)

    def _encode(self, samples: Sequence[Sample], inputs: Inputs) -> tuple[dict[str, Tensor], list[bool]]:
        """The inputs with labels and cut to length, and which of the samples were."""
        batch = self._labelled(inputs(samples))
        lengths = batch["attention_mask"].sum(1).tolist()
        if max(lengths) > self.max_length:
            batch = self._shorten(batch, lengths, samples, inputs)
        return self._split(batch, samples), [length > self.max_length for length in lengths]

    def _split(self, batch: dict[str, Tensor], samples: Sequence[Sample]) -> dict[str, Tensor]:
        labels, blocks = batch["labels"], batch["prompt_block_ids"]
        if self.causal:
            return batch | {"prompt_block_ids": torch.full_like(blocks, -1)}
        if not self.seen:
            return batch
        drawn = [Random(f"{self.seed}/{sample.source}/{sample.id}/seen") for sample in samples]
        rows = [
            split_captions(learned, shown, self.processor.tokenizer, self.seen, rng)
            for learned, shown, rng in zip(labels, blocks, drawn, strict=True)
        ]
        labels, blocks = map(torch.stack, zip(*rows, strict=True))
        return batch | {"labels": labels, "prompt_block_ids": blocks}

    def _labelled(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        if "prompt_block_ids" not in batch:
            raise BadSample(
                "no answer found", "the chat as it was written has none of the template's marks of answers."
            )
        labels = labels_from_prompt_blocks(
            batch["input_ids"], batch["attention_mask"], batch["prompt_block_ids"], *self.processor.media_token_ids
        )
        return {**batch, "labels": labels}

    def _shorten(
        self, batch: dict[str, Tensor], lengths: list[int], samples: Sequence[Sample], inputs: Inputs
    ) -> dict[str, Tensor]:
        kept = [self._kept(row, length) for row, length in zip(batch["labels"], lengths, strict=True)]
        for length, end, sample in zip(lengths, kept, samples, strict=True):
            if end == 0:
                raise BadSample(
                    Reason.ANSWER_LOST,
                    f"of {length} tokens max_length keeps {self.max_length}, and none of them is the answer's.",
                    sample.source,
                    sample.id,
                )
        # Again without the turns that go as a whole, so that their pictures go with them.
        answers = [_runs(row[:end]) for row, end in zip(batch["labels"], kept, strict=True)]
        rest = [_with_answers(sample, number) for sample, number in zip(samples, answers, strict=True)]
        if any(len(short.messages) < len(whole.messages) for short, whole in zip(rest, samples, strict=True)):
            batch = self._labelled(inputs(rest))
        gone = torch.arange(max(kept)) >= torch.tensor(kept)[:, None]
        fill = {"input_ids": self.processor.tokenizer.pad_token_id, "prompt_block_ids": -1, "labels": IGNORE_INDEX}
        shape = batch["input_ids"].shape
        return {
            name: values[:, : max(kept)].masked_fill(gone, fill.get(name, 0)) if values.shape == shape else values
            for name, values in batch.items()
        }

    def _kept(self, labels: Tensor, length: int) -> int:
        """Tokens that a sample keeps: all, or up to its last label that fits; 0 if nothing of an answer does."""
        if length <= self.max_length:
            return length
        learned = (labels[: self.max_length] != IGNORE_INDEX).nonzero()[:, 0]
        # The newline that a template may write before the answer is a label and says nothing.
        if not self.processor.tokenizer.decode(labels[learned], skip_special_tokens=True).strip():
            return 0
        return int(learned[-1]) + 1


def _runs(labels: Tensor) -> int:
    """How many answers there are: runs of labels."""
    learned = (labels != IGNORE_INDEX).int()
    return int((torch.diff(learned, prepend=torch.zeros(1, dtype=torch.int)) == 1).sum())


def _with_answers(sample: Sample, number: int) -> Sample:
    """The sample up to the end of its so many-th answer."""
    so_far = list(accumulate(message["role"] == "assistant" for message in sample.messages))
    end = so_far.index(number) + 1 if number in so_far else len(so_far)
    return sample if end == len(so_far) else replace(sample, messages=sample.messages[:end])


def _frames(source: Any) -> Any:
    try:
        return open_video([_picture(frame) for frame in source] if isinstance(source, list | tuple) else source)
    except ImageError as error:
        raise BadSample(error.reason, str(error)) from error


def _picture(source: Any) -> Any:
    try:
        image = open_image(source)
    except ImageError as error:
        raise BadSample(error.reason, str(error)) from error
    short, long = sorted(image.size)
    if short < MIN_SIDE or long > MAX_ASPECT * short:
        raise BadSample(Reason.ABSURD_SIZE, f"the picture has {image.width} x {image.height} pixels.")
    return image
