"""Images from other servers, of the public internet alone.

The address that was checked is the address that is connected to, so a name that changes its mind in between gains
nothing; every redirect is a new request that is checked anew; proxies of the environment are not asked.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Iterable
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpcore

from aki.apps.serve.limits import Limits, Refused

REDIRECTS = 3
_HTTP_ERRORS = (
    httpcore.NetworkError,
    httpcore.ProtocolError,
    httpcore.TimeoutException,
    httpcore.UnsupportedProtocol,
)


_UNICAST = ipaddress.ip_network("2000::/3")
"""All public IPv6 addresses so far; the rest has old site-local ones and several ways to write an IPv4 address."""


class NotPublic(Exception):
    """A name that leads to an address which is none of the clients' business."""


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet; IPv6 addresses that stand for IPv4 ones never are."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address) and (ip not in _UNICAST or ip.sixtofour or ip.teredo):
        return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved)


class PublicNetwork(httpcore.AsyncNetworkBackend):
    """Connects to a name by the addresses that it checked."""

    def __init__(self, inner: httpcore.AsyncNetworkBackend | None = None):
        self.inner = inner or httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = [str(entry[4][0]) for entry in found]
        if not addresses or not all(is_public(address) for address in addresses):
            raise NotPublic(host)
        return await self.inner.connect_tcp(addresses[0], port, timeout, local_address, socket_options)


async def fetch(url: str, limits: Limits, have: int, until: float) -> bytes:
    """What is at a URL.

    Args:
        have: bytes that were fetched for the same request before.
        until: when to give up, in the time of the running loop.

    Raises:
        Refused: an address that is not public, too many bytes, or no image there; why not stays unsaid, or a client
            could scan a network by the answers.
    """
    try:
        async with (
            asyncio.timeout_at(until),
            httpcore.AsyncConnectionPool(network_backend=PublicNetwork()) as pool,
        ):
            for _ in range(REDIRECTS + 1):
                location, body = await _get(pool, url, limits, have)
                if location is None:
                    return body
                url = urljoin(url, location)
    except (*_HTTP_ERRORS, OSError, ValueError) as error:
        raise _unreachable() from error
    except NotPublic as error:
        message = "an image's URL leads to an address that is not of the public internet."
        raise Refused(400, message, "invalid_image_url", "messages") from error
    raise _unreachable()


async def _get(pool: httpcore.AsyncConnectionPool, url: str, limits: Limits, have: int) -> tuple[str | None, bytes]:
    """Where a redirect leads, or the body."""
    if urlsplit(url).scheme not in ("http", "https"):
        raise ValueError("another scheme")
    async with pool.stream("GET", url.encode("ascii")) as response:
        if response.status in (301, 302, 303, 307, 308):
            locations = [value for name, value in response.headers if name.lower() == b"location"]
            return (locations[0].decode("ascii") if locations else ""), b""
        if response.status != 200:
            raise ValueError(f"status {response.status}")
        body = bytearray()
        async for chunk in response.aiter_stream():
            body += chunk
            if have + len(body) > limits.max_body:
                message = f"the remote images are larger than the {limits.max_body_mb} MB that this server takes."
                raise Refused(413, message, "body_too_large", "messages")
        return None, bytes(body)


def _unreachable() -> Refused:
    return Refused(400, "a remote image could not be fetched.", "invalid_image_url", "messages")
