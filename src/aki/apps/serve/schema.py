"""The part of OpenAI's chat completions that this server speaks."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logprobs": (False,),
    "tools": ([],),
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


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Prompting(BaseModel):
    """What the one who asks says: text, and images if a user does."""

    role: Literal["system", "developer", "user"]
    content: str | list[Part]


class Answering(BaseModel):
    role: Literal["assistant"]
    content: str | list[TextPart]


class StreamOptions(BaseModel):
    include_usage: bool = False


class ChatRequest(BaseModel):
    """The body of POST /v1/chat/completions.

    Absent, `temperature` is 0: an answer about a picture is greedy unless the client wants otherwise.
    """

    model_config = ConfigDict(extra="allow")

    model: str
    messages: list[Annotated[Prompting | Answering, Field(discriminator="role")]] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[str, Field(min_length=1)] | list[Annotated[str, Field(min_length=1)]] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _refuse_what_would_be_ignored(self) -> ChatRequest:
        for name, value in (self.model_extra or {}).items():
            if value is not None and name not in _WITHOUT_EFFECT and value not in _NEUTRAL.get(name, ()):
                raise ValueError(f"the parameter {name[:50]!r} is not supported here: leave it out")
        if self.messages[-1].role != "user":
            raise ValueError("the last message must be the user's")
        if isinstance(self.stop, list) and len(self.stop) > 4:
            raise ValueError("stop takes up to 4 strings")
        return self

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def asked_tokens(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    def images(self) -> list[str]:
        """The URLs of all images, in order."""
        parts = [part for message in self.messages if isinstance(message.content, list) for part in message.content]
        return [part.image_url.url for part in parts if isinstance(part, ImagePart)]

    def texts(self) -> list[str]:
        whole = [message.content for message in self.messages if isinstance(message.content, str)]
        lists = [message.content for message in self.messages if isinstance(message.content, list)]
        return whole + [part.text for parts in lists for part in parts if isinstance(part, TextPart)]

    def chat(self, images: list[Any]) -> list[dict[str, Any]]:
        """The messages in Hugging Face's form, with the images that `images()` names."""
        rest = iter(images)
        chat = []
        for message in self.messages:
            given = message.content
            parts = [TextPart(type="text", text=given)] if isinstance(given, str) else given
            content = [
                {"type": "text", "text": part.text}
                if isinstance(part, TextPart)
                else {"type": "image", "image": next(rest)}
                for part in parts
            ]
            chat.append({"role": "system" if message.role == "developer" else message.role, "content": content})
        return chat


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}
