"""AkiProcessor: chat messages with images, videos and audio in, what the model's forward takes out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from transformers import BatchFeature
from transformers.audio_utils import AudioInput
from transformers.image_utils import ImageInput
from transformers.processing_utils import MultiModalData
from transformers.tokenization_utils_base import TextInput
from transformers.utils.chat_template_utils import render_jinja_template
from transformers.video_utils import VideoInput

from aki.models.answers import of_this_thread, prompt_blocks, tokens_in
from aki.models.chats import Openers, begun, prepare
from aki.models.clips import ClipError, open_audio, open_video, pick_frames
from aki.models.images import open_image
from aki.models.plain_text import as_text
from aki.models.remote import SavedProcessor
from aki.models.template_limits import check_templates
from aki.models.templates import ANSWER_TOKEN, AUDIO_TOKEN, IMAGE_TOKEN, VIDEO_TOKEN
from aki.models.weights import check_sizes
from aki.prompts.scopes import check_scopes


class AkiProcessor(SavedProcessor):
    """What prepares each medium, and a tokenizer: they write one placeholder for every embedding of an item.

    Args:
        image_processor: any of transformers' that gives `pixel_values` of one fixed size.
        tokenizer: a fast tokenizer that has `image_token`, and `answer_token` if the chat template uses it.
        image_seq_length: placeholders an image, `AkiConfig.image_seq_length`.
        chat_template: a Jinja template whose answers stand between generation tags, or a dict of named ones.
        image_token, video_token, audio_token: stand for an image, a video, an audio clip in text.
        answer_token: starts an answer and belongs to the prompt, also where it swallows the white space after it.
        video_seq_length: placeholders a video, `config.media["pixel_values_videos"].tokens_per_item`. Absent: none.
        video_frames: frames that are picked of a video, evenly spaced, `AkiConfig.video_frames`.
        frame_processor: of the frames, as `image_processor`, which it is where absent.
        audio_seq_length: placeholders a clip, `config.media["input_features"].tokens_per_item`. Absent: none.
        audio_extractor: the audio encoder's own feature extractor, which pads to a fixed length, as Whisper's.

    Raises:
        ValueError: a placeholder that the tokenizer doesn't know, or audio without a feature extractor.
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        image_seq_length: int = 144,
        chat_template=None,
        image_token: str = IMAGE_TOKEN,
        answer_token: str = ANSWER_TOKEN,
        video_seq_length: int | None = None,
        video_frames: int = 8,
        video_token: str = VIDEO_TOKEN,
        frame_processor=None,
        audio_seq_length: int | None = None,
        audio_token: str = AUDIO_TOKEN,
        audio_extractor=None,
        **kwargs,
    ):
        self.image_seq_length = image_seq_length
        self.video_seq_length, self.video_frames, self.audio_seq_length = (
            video_seq_length,
            video_frames,
            audio_seq_length,
        )
        self.image_token, self.image_token_id = image_token, _placeholder_id(tokenizer, "image", image_token)
        # transformers looks for placeholders of every kind that has a token.
        self.video_token: Any = None
        self.audio_token: Any = None
        self.video_token_id = self.audio_token_id = None
        if video_seq_length is not None:
            self.video_token, self.video_token_id = video_token, _placeholder_id(tokenizer, "video", video_token)
        if audio_seq_length is not None:
            self.audio_token, self.audio_token_id = audio_token, _placeholder_id(tokenizer, "audio", audio_token)
        self.answer_token, self.answer_token_id = answer_token, _token_id(tokenizer, answer_token)
        self.frame_processor = self._loaded(frame_processor, "image_processor_type")
        self.audio_extractor = self._loaded(audio_extractor, "feature_extractor_type")
        if audio_seq_length is not None and audio_extractor is None:
            raise ValueError("audio needs the encoder's feature extractor: pass audio_extractor.")
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs) -> Any:
        """As transformers'.

        Raises:
            ValueError: a chat template that never ends, or fills the memory; sizes that do.
        """
        name = pretrained_model_name_or_path
        # On a terminal transformers would ask whether to run the code of a tokenizer's folder.
        kwargs["trust_remote_code"] = bool(kwargs.get("trust_remote_code"))
        check_sizes(cls.get_processor_dict(name, **kwargs)[0], name)
        processor = super().from_pretrained(name, **kwargs)
        # Older folders keep these in a file of their own.
        check_sizes(processor.image_processor.to_dict(), name)
        check_templates(processor)
        return processor

    def _loaded(self, part: Any, type_key: str) -> Any:
        """A saved processor holds its parts as dictionaries."""
        return self.get_possibly_dynamic_module(part[type_key])(**part) if isinstance(part, dict) else part

    @property
    def feature_extractor(self) -> Any:
        """By this name transformers looks for what prepares audio."""
        return self.audio_extractor

    @property
    def video_processor(self) -> Any:
        """By this name transformers looks for what prepares videos."""
        return self.frame_processor or self.image_processor

    @property
    def media_token_ids(self) -> list[int]:
        """The placeholders of the media that it takes."""
        ids = (self.image_token_id, self.video_token_id, self.audio_token_id)
        return [token_id for token_id in ids if token_id is not None]

    @property
    def media_kinds(self) -> tuple[str, ...]:
        """The types of media parts that its chats may have."""
        return tuple(self._openers)

    @property
    def _openers(self) -> Openers:
        openers: Openers = {"image": open_image}
        if self.video_seq_length is not None:
            openers["video"] = open_video
        if self.audio_seq_length is not None:
            openers["audio"] = partial(open_audio, sampling_rate=self.audio_extractor.sampling_rate)
        return openers

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        return self.image_token * self.image_seq_length

    def _get_num_multimodal_tokens(self, image_sizes: list[list[int]] | None = None, **kwargs) -> MultiModalData:
        """By this name vLLM asks how many placeholders each image takes, whatever its (height, width)."""
        images = len(image_sizes or [])
        return MultiModalData(num_image_tokens=[self.image_seq_length] * images, num_image_patches=[1] * images)

    def __call__(
        self,
        images: ImageInput | None = None,
        text: TextInput | list[TextInput] | None = None,
        videos: VideoInput | None = None,
        audio: AudioInput | None = None,
        **kwargs,
    ) -> BatchFeature:
        """Text with a token of its kind once an item, and the items of each kind in order, as model inputs.

        Args:
            images: an image, a list of them, or a list a text; anything that `aki.models.images.open_image` opens.
            text: one text or a list. Chats go through `apply_chat_template`, which also writes `prompt_block_ids`.
            videos: a list of videos; anything that `aki.models.clips.open_video` opens.
            audio: a list of clips; anything that `aki.models.clips.open_audio` opens.

        Raises:
            ValueError: more or fewer items than the text names, or items of a kind that it was not made for.
            ImageError, ClipError: an item that cannot be read.
        """
        given = {"image": images, "video": videos, "audio": audio}
        refused = [kind for kind, items in given.items() if items is not None and kind not in self._openers]
        if refused:
            raise ValueError(f"this processor takes {', '.join(self._openers)} alone, not {', '.join(refused)}.")
        if images is not None:
            images = _open_nested(images)
            images = None if _is_empty(images) else images
        if videos is not None:
            videos = [open_video(video) for video in _flat(videos)] or None
        if audio is not None:
            audio = [self._openers["audio"](clip) for clip in audio] or None
        out = super().__call__(images=images, text=text, videos=videos, audio=audio, **kwargs)
        if "offset_mapping" in out:
            # transformers' apply_chat_template takes that name out again.
            out["characters"] = out["offset_mapping"]
        return out

    def _process_videos(self, videos: list[np.ndarray], **kwargs) -> tuple[dict, list[str]]:
        frames = [frame for video in videos for frame in pick_frames(video, self.video_frames)]
        pixels = np.stack(self.video_processor([open_image(frame) for frame in frames])["pixel_values"])
        values = pixels.reshape(len(videos), self.video_frames, *pixels.shape[1:])
        return {"pixel_values_videos": values}, [self.video_token * self.video_seq_length] * len(videos)

    def _process_audio(self, audio: list[np.ndarray], **kwargs) -> tuple[dict, list[str]]:
        """Its own padding stands: what is asked for of the text (padding, max_length) is not meant for waveforms."""
        longest = max(len(clip) for clip in audio)
        room, rate = getattr(self.audio_extractor, "n_samples", longest), self.audio_extractor.sampling_rate
        if longest > room:
            raise ClipError(
                f"an audio clip has {longest / rate:.1f} s, the encoder hears {room / rate:.1f} s: cut it into clips."
            )
        features = self.audio_extractor(audio, sampling_rate=rate, return_tensors="np")["input_features"]
        return {"input_features": features}, [self.audio_token * self.audio_seq_length] * len(audio)

    def validate_inputs(self, images=None, text=None, videos=None, audio=None, **kwargs) -> None:
        """As transformers', and as many items as the texts name, each text with its own list of images."""
        if text is not None:
            if not all(isinstance(sample, str) for sample in text):
                raise ValueError("text is a string or a list of strings.")
            self._check_total("image", self.image_token, text, None if images is None else list(_leaves(images)))
            self._check_total("video", self.video_token, text, videos)
            self._check_total("audio", self.audio_token, text, audio)
        super().validate_inputs(images=images, text=text, videos=videos, audio=audio, **kwargs)
        if isinstance(images, list) and isinstance(images[0], list) and text is not None:
            for row, (sample, own) in enumerate(zip(text, images, strict=True)):
                if sample.count(self.image_token) != len(own):
                    raise ValueError(
                        f"text {row} names {sample.count(self.image_token)} image(s) and has {len(own)}: "
                        f"pass one image for each {self.image_token}."
                    )

    def _check_total(self, kind: str, token: str | None, text: list[str], items: Sequence | None) -> None:
        named = 0 if token is None else sum(sample.count(token) for sample in text)
        given = 0 if items is None else len(items)
        if named != given:
            raise ValueError(
                f"found {named} {token} tokens in the text and {given} {kind}(s): pass one {kind} for each {token}."
            )

    def apply_chat_template(self, conversation, *args, **kwargs) -> Any:
        """As transformers' `apply_chat_template`; with `tokenize=True, return_dict=True` also `prompt_block_ids`.

        `prompt_block_ids` has the shape of input_ids: 0, 1, ... for each stretch of prompt between answers, each up to
        and including the token that starts the answer; -1 for answers, captions and padding.

        Raises:
            ValueError: an empty chat or question, or a template that does not mark the answers.
            ImageError, ClipError: an image, a video or a clip that cannot be read.
        """
        conversation = prepare(conversation, self._openers)
        check_scopes(conversation if isinstance(conversation[0], list) else [conversation], self)
        if kwargs.get("continue_final_message"):
            conversation = begun(conversation)
        if not kwargs.get("tokenize"):
            return super().apply_chat_template(conversation, *args, **kwargs)
        with as_text(self, conversation) as conversation:
            if not kwargs.get("return_dict"):
                return super().apply_chat_template(conversation, *args, **kwargs)
            return self._with_prompt_blocks(conversation, *args, **kwargs)

    def _with_prompt_blocks(self, conversation, *args, **kwargs) -> BatchFeature:
        return_tensors = kwargs.pop("return_tensors", None)
        asked_for_masks = kwargs.pop("return_assistant_tokens_mask", False)
        if kwargs.pop("continue_final_message", False):
            out = self._continued(conversation, *args, **kwargs)
        else:
            out = self._with_answers_marked(conversation, *args, **kwargs)
        answers = out["assistant_masks"] if asked_for_masks else out.pop("assistant_masks")
        out["prompt_block_ids"] = [
            prompt_blocks(*row, self.answer_token_id)
            for row in zip(out["input_ids"], out["attention_mask"], answers, strict=True)
        ]
        return BatchFeature(dict(out), tensor_type=return_tensors)

    @property
    def model_input_names(self) -> list[str]:
        media = {"video": "pixel_values_videos", "audio": "input_features"}
        taken = [name for kind, name in media.items() if kind in self._openers]
        return [*super().model_input_names, *taken, "prompt_block_ids"]

    def _with_answers_marked(self, conversation, *args, **kwargs) -> Any:
        out = self._rendered(conversation, *args, **kwargs, return_assistant_tokens_mask=True)
        chats = conversation if isinstance(conversation[0], list) else [conversation]
        # transformers' own masks are not asked: in older releases they forget that one placeholder became many.
        spans = self._answer_spans(chats, *args, **kwargs)
        out["assistant_masks"] = [tokens_in(*row) for row in zip(out.pop("characters"), spans, strict=True)]
        for row, (chat, answers) in enumerate(zip(chats, out["assistant_masks"], strict=True)):
            if any(message["role"] == "assistant" for message in chat) and not any(answers):
                raise ValueError(
                    f"no answer was found in chat {row}: the chat template must put "
                    "{% generation %} and {% endgeneration %} around answers, and max_length must leave room for them."
                )
        return out

    def _answer_spans(self, chats, chat_template: str | None = None, **kwargs) -> list[list[tuple[int, int]]]:
        """Of each chat, the characters (first, end) of its answers in the text that has all placeholders."""
        texts, spans = render_jinja_template(
            chats,
            chat_template=of_this_thread(self.template(chat_template)),
            return_assistant_tokens_mask=True,
            **{**self.tokenizer.special_tokens_map, **kwargs},
        )
        repeats = {
            self.image_token: self.image_seq_length,
            self.video_token: self.video_seq_length,
            self.audio_token: self.audio_seq_length,
        }

        def shifted(text: str, character: int) -> int:
            before = text[:character]
            longer = (before.count(token) * len(token) * (n - 1) for token, n in repeats.items() if token and n)
            return character + sum(longer)

        return [
            [(shifted(text, first), shifted(text, end)) for first, end in of_one]
            for text, of_one in zip(texts, spans, strict=True)
        ]

    def template(self, name: str | None = None) -> str | None:
        """The chat template of that name, or `name` itself, which may be a template; None is the default one."""
        named = self.chat_template if isinstance(self.chat_template, dict) else {"default": self.chat_template}
        return named.get(name or "default", name)

    def _continued(self, conversation, *args, **kwargs) -> Any:
        """The last answer is begun and not ended: what stands before it is found by leaving it out."""
        chats = conversation if isinstance(conversation[0], list) else [conversation]
        out = self._rendered(conversation, *args, **kwargs, continue_final_message=True)
        kwargs["add_generation_prompt"] = True
        before = self._with_answers_marked([chat[:-1] for chat in chats], *args, **kwargs)
        out["assistant_masks"] = []
        for row, attention in enumerate(out["attention_mask"]):
            known = [m for m, a in zip(before["assistant_masks"][row], before["attention_mask"][row], strict=True) if a]
            opened = iter(known + [1] * sum(attention))
            out["assistant_masks"].append([next(opened) if a else 0 for a in attention])
        return out

    def _rendered(
        self, conversation, chat_template: str | None = None, *, processor_kwargs: dict | None = None, **kwargs
    ) -> Any:
        return super().apply_chat_template(
            conversation,
            chat_template=of_this_thread(self.template(chat_template)),
            # A copy, because transformers writes into it.
            processor_kwargs=dict(processor_kwargs or {}),
            return_tensors=None,
            **kwargs,
        )


def _placeholder_id(tokenizer, kind: str, token: str) -> int:
    token_id = _token_id(tokenizer, token)
    if token_id is None:
        raise ValueError(f"the tokenizer does not know the {kind} token {token!r}: add it as a special token.")
    return token_id


def _token_id(tokenizer, token: str) -> int | None:
    token_id = tokenizer.convert_tokens_to_ids(token)
    return None if token_id == tokenizer.unk_token_id else token_id


def _open_nested(images):
    if isinstance(images, (list, tuple)):
        return [_open_nested(image) for image in images]
    return open_image(images)


def _leaves(images) -> Iterator[Any]:
    if isinstance(images, (list, tuple)):
        for image in images:
            yield from _leaves(image)
    else:
        yield images


def _is_empty(images) -> bool:
    """Whether no text has an image: an empty list, or one of empty lists."""
    return isinstance(images, list) and all(map(_is_empty, images))


def _flat(videos) -> Iterator[Any]:
    """The videos in order; a chat's come as a list of arrays."""
    for item in videos:
        if isinstance(item, list) and all(isinstance(video, np.ndarray) and video.ndim == 4 for video in item):
            yield from item
        else:
            yield item
