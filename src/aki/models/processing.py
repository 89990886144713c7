"""AkiProcessor: chat messages with images in, what the model's forward takes out."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

from torch import Tensor
from transformers import BatchFeature, ProcessorMixin

from aki.layout import END_SCOPE_TOKEN, SCOPE_TOKEN
from aki.models.images import open_image
from aki.models.templates import ANSWER_TOKEN, IMAGE_TOKEN

_SCOPE_PARTS = tuple({"type": "text", "text": token} for token in (SCOPE_TOKEN, END_SCOPE_TOKEN))


class AkiProcessor(ProcessorMixin):
    """An image processor and a tokenizer that write one placeholder for every embedding of an image.

    Args:
        image_processor: any of transformers' that gives `pixel_values` of one fixed size.
        tokenizer: a fast tokenizer that has `image_token`, and `answer_token` if the chat template uses it.
        image_seq_length: placeholders an image, `AkiConfig.image_seq_length`.
        chat_template: a Jinja template whose answers stand between generation tags, or a dict of named ones.
        image_token: stands for an image in text.
        answer_token: starts an answer and belongs to the prompt, also where it swallows the white space after it.
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        image_seq_length: int = 144,
        chat_template=None,
        image_token: str = IMAGE_TOKEN,
        answer_token: str = ANSWER_TOKEN,
        **kwargs,
    ):
        self.image_seq_length = image_seq_length
        image_token_id = _token_id(tokenizer, image_token)
        if image_token_id is None:
            raise ValueError(f"the tokenizer does not know the image token {image_token!r}: add it as a special token.")
        self.image_token, self.image_token_id = image_token, image_token_id
        self.answer_token, self.answer_token_id = answer_token, _token_id(tokenizer, answer_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        return self.image_token * self.image_seq_length

    def __call__(self, images=None, text=None, **kwargs) -> BatchFeature:
        """Text with `image_token` once an image, and the images in order, as model inputs.

        Args:
            images: an image, a list of them, or a list a text; anything that `aki.models.images.open_image` opens.
            text: one text or a list. Chats go through `apply_chat_template`, which also writes `prompt_block_ids`.

        Raises:
            ValueError: more or fewer images than the text names.
            ImageError: an image that cannot be read.
        """
        if images is not None:
            images = _open_nested(images)
            images = None if images == [] else images
        return super().__call__(images=images, text=text, **kwargs)

    def validate_inputs(self, images=None, text=None, **kwargs) -> None:
        """As transformers', which compares the totals alone, and also each text with its own list of images."""
        super().validate_inputs(images=images, text=text, **kwargs)
        if isinstance(images, list) and isinstance(images[0], list) and text is not None:
            for row, (sample, own) in enumerate(zip(text, images, strict=True)):
                if sample.count(self.image_token) != len(own):
                    raise ValueError(
                        f"text {row} names {sample.count(self.image_token)} image(s) and has {len(own)}: "
                        f"pass one image for each {self.image_token}."
                    )

    def apply_chat_template(self, conversation, *args, **kwargs) -> Any:
        """As transformers' `apply_chat_template`; with `tokenize=True, return_dict=True` also `prompt_block_ids`.

        `prompt_block_ids` has the shape of input_ids: 0, 1, ... for each stretch of prompt between answers, each up to
        and including the token that starts the answer; -1 for answers, captions and padding.

        Raises:
            ValueError: an empty chat or question, or a template that does not mark the answers.
            ImageError: an image that cannot be read.
        """
        conversation = _prepare(conversation)
        self._check_scopes(conversation)
        if not (kwargs.get("tokenize") and kwargs.get("return_dict")):
            return super().apply_chat_template(conversation, *args, **kwargs)
        return_tensors = kwargs.pop("return_tensors", None)
        asked_for_masks = kwargs.pop("return_assistant_tokens_mask", False)
        if kwargs.pop("continue_final_message", False):
            out = self._continued(conversation, *args, **kwargs)
        else:
            out = self._with_answers_marked(conversation, *args, **kwargs)
        answers = out["assistant_masks"] if asked_for_masks else out.pop("assistant_masks")
        out["prompt_block_ids"] = [
            self._prompt_blocks(*row) for row in zip(out["input_ids"], out["attention_mask"], answers, strict=True)
        ]
        return BatchFeature(dict(out), tensor_type=return_tensors)

    def _check_scopes(self, conversation: list) -> None:
        chats = conversation if isinstance(conversation[0], list) else [conversation]
        scoped = any(part in _SCOPE_PARTS for chat in chats for message in chat for part in message["content"])
        unknown = [t for t in (SCOPE_TOKEN, END_SCOPE_TOKEN) if _token_id(self.tokenizer, t) is None]
        if scoped and unknown:
            raise ValueError(
                f"the chat has scopes, but the tokenizer does not know {' and '.join(unknown)}: add them as special "
                "tokens, and set scope_token_ids in the model's configuration."
            )

    @property
    def model_input_names(self) -> list[str]:
        return [*super().model_input_names, "prompt_block_ids"]

    def _with_answers_marked(self, conversation, *args, **kwargs) -> Any:
        out = self._rendered(conversation, *args, **kwargs, return_assistant_tokens_mask=True)
        chats = conversation if isinstance(conversation[0], list) else [conversation]
        for row, (chat, answers) in enumerate(zip(chats, out["assistant_masks"], strict=True)):
            if any(message["role"] == "assistant" for message in chat) and not any(answers):
                raise ValueError(
                    f"no answer was found in chat {row}: the chat template must put "
                    "{% generation %} and {% endgeneration %} around answers, and max_length must leave room for them."
                )
        return out

    def _continued(self, conversation, *args, **kwargs) -> Any:
        """The last answer is begun and not ended: what stands before it is found by leaving it out."""
        chats = conversation if isinstance(conversation[0], list) else [conversation]
        out = self._rendered(conversation, *args, **kwargs, continue_final_message=True)
        kwargs["add_generation_prompt"] = True
        before = self._with_answers_marked([chat[:-1] for chat in chats], *args, **kwargs)
        out["assistant_masks"] = []
        for row, attention in enumerate(out["attention_mask"]):
            known = [m for m, a in zip(before["assistant_masks"][row], before["attention_mask"][row], strict=True) if a]
            begun = iter(known + [1] * sum(attention))
            out["assistant_masks"].append([next(begun) if a else 0 for a in attention])
        return out

    def _rendered(self, *args, processor_kwargs: dict | None = None, **kwargs) -> Any:
        # A copy, because transformers writes into it.
        return super().apply_chat_template(
            *args, **kwargs, processor_kwargs=dict(processor_kwargs or {}), return_tensors=None
        )

    def _prompt_blocks(self, input_ids: list[int], attention_mask: list[int], answers: list[int]) -> list[int]:
        starts_answer = [token == self.answer_token_id for token in input_ids]
        prompt = [
            bool(real and (start or not answer))
            for real, start, answer in zip(attention_mask, starts_answer, answers, strict=True)
        ]
        blocks, block = [-1] * len(input_ids), 0
        for is_prompt, run in groupby(range(len(input_ids)), key=prompt.__getitem__):
            if is_prompt:
                positions = list(run)
                # White space that a template writes after the token is answer (paper, section 3).
                end = max((p for p in positions if starts_answer[p]), default=positions[-1]) + 1
                blocks[positions[0] : end] = [block] * (end - positions[0])
                block += 1
        return blocks


def labels_from_prompt_blocks(input_ids: Tensor, attention_mask: Tensor, prompt_block_ids: Tensor, image_token_id: int):
    """Labels for training on answers alone: every token outside prompt blocks, padding and images; -100 elsewhere.

    Args:
        input_ids: (batch, length); the others have the same shape.
    """
    learned = (prompt_block_ids < 0) & (attention_mask == 1) & (input_ids != image_token_id)
    return input_ids.masked_fill(~learned, -100)


def _token_id(tokenizer, token: str) -> int | None:
    token_id = tokenizer.convert_tokens_to_ids(token)
    return None if token_id == tokenizer.unk_token_id else token_id


def _open_nested(images):
    if isinstance(images, (list, tuple)):
        return [_open_nested(image) for image in images]
    return open_image(images)


def _prepare(conversation):
    """Check the chat, and open its images (into copies of the messages)."""
    if not conversation:
        raise ValueError("the chat is empty: pass at least one message.")
    if isinstance(conversation[0], (list, tuple)):
        return [_prepare(chat) for chat in conversation]
    return [_prepare_message(message) for message in conversation]


def _prepare_message(message: dict) -> dict:
    content = message.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    content = [_prepare_part(part) for part in _without_scopes(content or [])]
    texts = [part.get("text", "") for part in content if part.get("type") == "text" and part not in _SCOPE_PARTS]
    if message.get("role") == "user" and (not content or (texts and not any(text.strip() for text in texts))):
        raise ValueError("the question is empty: a user's message needs text.")
    return {**message, "content": content}


def _without_scopes(parts: list[dict]) -> Iterator[dict]:
    """Scopes, and tables as scopes of rows of cells, written out as tokens around what stands in them."""
    for part in parts:
        inside = part.get("content") or []
        if part.get("type") == "table":
            rows = [[{"type": "scope", "content": cell} for cell in row] for row in part["rows"]]
            inside = [{"type": "scope", "content": row} for row in rows]
        if part.get("type") in ("scope", "table"):
            yield _SCOPE_PARTS[0]
            yield from _without_scopes(inside)
            yield _SCOPE_PARTS[1]
        else:
            yield part


def _prepare_part(part: dict) -> dict:
    if part.get("type") == "image_url":
        url = part["image_url"]
        part = {"type": "image", "url": url["url"] if isinstance(url, dict) else url}
    if part.get("type") != "image":
        return part
    for key in ("image", "url", "path", "base64"):
        if part.get(key) is not None:
            source = f"data:image;base64,{part[key]}" if key == "base64" else part[key]
            return {"type": "image", "image": open_image(source)}
    raise ValueError("an image part of a message has no image: give it `image`, `url`, `path` or `base64`.")
