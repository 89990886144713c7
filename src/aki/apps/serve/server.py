"""The application on a socket, until SIGTERM or Ctrl-C."""

from __future__ import annotations

import asyncio
import json
import resource
import signal
import socket
import sys
from contextlib import suppress
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from aki.apps.serve.app import build_app
from aki.apps.serve.engine import Engine
from aki.apps.serve.limits import Limits, Refused

LOCAL = ("127.0.0.1", "localhost", "::1", "[::1]")
GRACE = 300
"""Seconds that running answers have to come to their end after SIGTERM."""


MOST_CONNECTIONS = 4096
"""At a time, where the process may have that many open files."""
RESERVED = 32
"""Open files that are kept for the rest of the process."""
_REFUSAL = Refused(503, "the server has as many connections as it can keep: try again later.", "too_many_connections")
_BODY = json.dumps(_REFUSAL.body).encode()
_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nContent-Length: %d\r\n"
    b"Retry-After: 1\r\nConnection: close\r\n\r\n%s" % (len(_BODY), _BODY)
)


class ImpatientProtocol(H11Protocol):
    """uvicorn waits for ever for the head of a request, for what is left of a body that was answered already, and for a
    client to take in its answer; this does not."""

    patience = 20.0
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        # Writing is paused as soon as the client's own buffers are full.
        transport.set_write_buffer_limits(high=0)
        self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()
        elif self._timer is None:
            self._wait()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stop_waiting()
        self._wait()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait(self) -> None:
        self._timer = self.loop.call_later(self.patience, self.transport.abort)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None


class Listener(socket.socket):
    """A listening socket that accepts no more connections than this process can keep open.

    At a process's limit of open files asyncio tries again at once and for ever, and what is connected already starves.
    """

    most = RESERVED

    @classmethod
    def at(cls, host: str, port: int) -> Listener:
        """
        Raises:
            OSError, OverflowError: the address cannot be had.
        """
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = cls(fileno=socket.create_server((host, port), family=family).detach())
        # asyncio leaves it out for sockets that it did not make: a kept connection would wait 40 ms for each answer.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        files = MOST_CONNECTIONS if files == resource.RLIM_INFINITY else min(files, MOST_CONNECTIONS)
        listener.most = files - min(RESERVED, files // 2)
        return listener

    def accept(self) -> tuple[socket.socket, Any]:
        """As a socket's own; those beyond the limit get their refusal here."""
        while True:
            connection, address = super().accept()
            # The lowest number that is free is given out, so it says how many files are open.
            if connection.fileno() < self.most:
                return connection, address
            with connection, suppress(OSError):
                connection.setblocking(False)
                connection.send(_FULL)
                connection.shutdown(socket.SHUT_WR)


def serve(engine: Engine, host: str, port: int, limits: Limits, *, remote_images: bool, api_key: str | None) -> None:
    """Serve until SIGTERM or SIGINT, then finish what is running and return.

    Args:
        port: 0 for any that is free; the line on standard output says which.

    Raises:
        OSError: the address is taken, or none of this machine's.
    """
    hosts = LOCAL if host in LOCAL else ()
    app = build_app(engine, limits, remote_images=remote_images, api_key=api_key, hosts=hosts)
    if not hosts and api_key is None:
        print(f"aki: {host} can be reached by others, and there is no --api-key.", file=sys.stderr)
    try:
        listener = Listener.at(host, port)
    except (OSError, OverflowError) as error:
        raise OSError(f"port {port} of {host} cannot be had: {getattr(error, 'strerror', None) or error}.") from error
    protocol = type("Protocol", (ImpatientProtocol,), {"patience": limits.patience})
    config = uvicorn.Config(
        app, http=protocol, ws="none", log_level="warning", timeout_graceful_shutdown=GRACE, server_header=False
    )
    # uvicorn raises the signal again when it is done, for who was there before.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    shown = f"[{host}]" if ":" in host else host
    print(f"{engine.name} answers at http://{shown}:{listener.getsockname()[1]}/v1", flush=True)
    uvicorn.Server(config).run(sockets=[listener])
