"""The part of OpenAI's chat completions that this server speaks."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

MOST_ITEMS = 1000
"""Messages of a chat, and parts of a message: a body of nothing else would keep the server busy with reading it."""

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logprobs": (False,),
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "function_call": ("none",),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
}
"""Parameters that would change the answer, and the values with which they don't."""

_WITHOUT_EFFECT = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}


class ImageURL(BaseModel):
    url: str


class ImagePart(BaseModel):
    type: Literal["image_url"]
    image_url: ImageURL


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


def _text_as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _none_as_nothing(content: Any) -> Any:
    return [] if content is None else _text_as_parts(content)


def _one_as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]
Content = Annotated[list[Part], Field(max_length=MOST_ITEMS), BeforeValidator(_text_as_parts)]
Stops = Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=4), BeforeValidator(_one_as_list)]


class Prompting(BaseModel):
    """What the one who asks says: text, and images if a user does."""

    role: Literal["system", "developer", "user"]
    content: Content


class Answering(BaseModel):
    """What was answered before. Without content it is a call of tools, which no model here makes: an empty turn."""

    role: Literal["assistant"]
    content: Annotated[list[TextPart], Field(max_length=MOST_ITEMS), BeforeValidator(_none_as_nothing)] = []


class StreamOptions(BaseModel):
    include_usage: bool = False


class ChatRequest(BaseModel):
    """The body of POST /v1/chat/completions.

    Absent, `temperature` is 0: an answer about a picture is greedy unless the client wants otherwise.
    """

    model_config = ConfigDict(extra="allow")

    model: str
    messages: list[Annotated[Prompting | Answering, Field(discriminator="role")]] = Field(
        min_length=1, max_length=MOST_ITEMS
    )
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stops | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _refuse_what_would_be_ignored(self) -> ChatRequest:
        for name, value in (self.model_extra or {}).items():
            if value is not None and name not in _WITHOUT_EFFECT and value not in _NEUTRAL.get(name, ()):
                raise _wrong(name[:50], f"the parameter {name[:50]!r} is not supported here: leave it out")
        try:
            for text in self.texts():
                text.encode()
        except UnicodeEncodeError as error:
            raise _wrong("messages", "the text of a message is not Unicode") from error
        if self.messages[-1].role != "user":
            raise _wrong("messages", "the last message must be the user's")
        return self

    @property
    def asked_tokens(self) -> tuple[str, int | None]:
        """The name of the parameter that says how many, and what it says."""
        newer = self.max_completion_tokens
        return ("max_tokens", self.max_tokens) if newer is None else ("max_completion_tokens", newer)

    def images(self) -> list[str]:
        """The URLs of all images, in order."""
        return [part.image_url.url for part in self._parts() if isinstance(part, ImagePart)]

    def texts(self) -> list[str]:
        return [part.text for part in self._parts() if isinstance(part, TextPart)]

    def chat(self, images: list[Any]) -> list[dict[str, Any]]:
        """The messages in Hugging Face's form, with the images that `images()` names."""
        rest = iter(images)
        chat = []
        for message in self.messages:
            content = [
                {"type": "text", "text": part.text}
                if isinstance(part, TextPart)
                else {"type": "image", "image": next(rest)}
                for part in message.content
            ]
            chat.append({"role": "system" if message.role == "developer" else message.role, "content": content})
        return chat

    def _parts(self) -> list[Part]:
        return [part for message in self.messages for part in message.content]


def _wrong(param: str, message: str) -> PydanticCustomError:
    return PydanticCustomError("wrong", "{said}", {"said": message, "param": param})


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}
