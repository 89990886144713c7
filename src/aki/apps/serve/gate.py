"""What every request passes before the application sees it: the key, the body's size and time."""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
from collections.abc import Collection
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from aki.apps.serve.limits import Limits, Refused, failed
from aki.apps.serve.metrics import Metrics

logger = logging.getLogger(__name__)

BODIES = 16
"""Bodies of the largest size that are held at a time, so that many large ones don't fill the memory."""


MOST_COMMAS = 100_000
"""In a body: one of nothing but small values would keep the server from everybody else while it is read."""


_HOST = re.compile(r"(\[[^\[\]]*\]|[^:\[\]]*)(:\d*)?")
"""A name or an address, and a port."""


class Gate:
    """An ASGI application around another.

    A body is read whole before the application is called, and one that is refused is still read (and dropped): a client
    that is answered while it writes might never read the answer.
    """

    def __init__(self, app: ASGIApp, limits: Limits, metrics: Metrics, api_key: str | None, hosts: Collection[str]):
        self.app, self.limits, self.metrics, self.hosts = app, limits, metrics, hosts
        self._key = None if api_key is None else api_key.encode()
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        send = self._counting(scope, send)
        body = bytearray()
        try:
            self._check_host(scope)
            self._check_key(scope)
            await self._read(body, receive)
            await self.app(scope, _again(bytes(body), receive), send)
        except Refused as refused:
            await JSONResponse(refused.body, refused.status, refused.headers)(scope, receive, send)
        except _HungUp:
            self.metrics.count(scope["path"], 499)
        except Exception:
            # Left to uvicorn, it would end the connection, on which a client may have sent its next request.
            logger.exception("a request failed")
            await JSONResponse(failed().body, 500)(scope, receive, send)
        finally:
            self._held -= len(body)

    def _check_host(self, scope: Scope) -> None:
        """A page in a browser can lead a name of its own here, but not call itself localhost."""
        named = _HOST.fullmatch(dict(scope["headers"]).get(b"host", b"").decode("latin-1").lower())
        if self.hosts and (named is None or named[1] not in self.hosts):
            message = f"the Host header must name this machine as one of {', '.join(self.hosts)}."
            raise Refused(400, message, "unknown_host")

    def _check_key(self, scope: Scope) -> None:
        if self._key is None or scope["path"] == "/health":
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        if not hmac.compare_digest(given, b"Bearer " + self._key):
            message = "this server wants an API key: Authorization: Bearer KEY."
            raise Refused(401, message, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    async def _read(self, body: bytearray, receive: Receive) -> None:
        refused: Refused | None = None
        try:
            async with asyncio.timeout(self.limits.patience):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _HungUp
                    more, chunk = message.get("more_body", False), message.get("body", b"")
                    refused = refused or self._too_much(len(body), len(chunk))
                    if refused is None:
                        body += chunk
                        self._held += len(chunk)
        except TimeoutError as error:
            slow = f"the request was not there after {self.limits.patience:g} seconds."
            raise refused or Refused(408, slow, "too_slow", headers={"Connection": "close"}) from error
        if refused is not None:
            raise refused
        if body.count(b",") > MOST_COMMAS:
            raise Refused(
                400, f"the body has more than {MOST_COMMAS} commas: no chat has so many parts.", "too_many_parts"
            )

    def _too_much(self, have: int, more: int) -> Refused | None:
        if have + more > self.limits.max_body:
            message = f"the body is larger than the {self.limits.max_body_mb} MB that this server takes."
            return Refused(413, message, "body_too_large")
        if self._held + more > BODIES * self.limits.max_body:
            return Refused(
                429, "too many large requests at a time: try again later.", "queue_full", headers={"Retry-After": "1"}
            )
        return None

    def _counting(self, scope: Scope, send: Send) -> Send:
        async def wrapped(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.metrics.count(scope["path"], message["status"])
            await send(message)

        return wrapped


class _HungUp(Exception):
    """The client is gone."""


def _again(body: bytes, receive: Receive) -> Receive:
    """`receive` of a request whose body was read already."""
    given: Any = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def wrapped() -> Message:
        return next(given, None) or await receive()

    return wrapped
