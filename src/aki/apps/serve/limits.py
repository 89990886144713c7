"""What a client may ask of the server, and the answer to one that asks for more."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Limits:
    """All limits hold for one request, unless they say otherwise."""

    max_body_mb: int = 20
    """Megabytes of the body, and of its remote images together."""
    max_images: int = 8
    max_megapixels: int = 50
    """Of all images together, before they are decoded."""
    max_tokens: int = 1024
    """New tokens of an answer; what a request gets that asks for no number."""
    max_batch: int = 32
    """Requests that are answered together."""
    max_waiting: int = 64
    """Requests that wait for the model, with images three quarters of it at most; more are sent away with 429."""
    patience: float = 20.0
    """Seconds that a client may take to send a request, or to take in the next piece of its answer."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) <= 0:
                raise ValueError(f"{field.name} is {getattr(self, field.name)}: it must be more than 0.")

    @property
    def max_body(self) -> int:
        """Bytes."""
        return self.max_body_mb * 1_000_000


class Refused(Exception):
    """A request that is answered with an error in OpenAI's form.

    Args:
        status: the HTTP status.
        message: a sentence for the client.
        code: one word for programs.
        param: the field of the request that is at fault.
        headers: of the answer.
    """

    def __init__(
        self, status: int, message: str, code: str, param: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = headers or {}

    @property
    def body(self) -> dict[str, dict[str, str | None]]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def failed() -> Refused:
    """What a client gets to know of a fault of the server."""
    return Refused(500, "the server failed on this request; its log says how.", "server_error")


def unable() -> Refused:
    """What a client gets to know where nobody can answer it."""
    return Refused(
        503, "the server's model has stopped, or has made no step for a long time; its log may say why.", "server_error"
    )
