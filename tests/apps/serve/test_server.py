"""The connection itself."""

import socket
import threading
import time

import uvicorn

from aki.apps.serve.server import ImpatientProtocol


class Impatient(ImpatientProtocol):
    patience = 0.5


def test_a_client_that_does_not_read_its_answer_is_given_up():
    ended = threading.Event()

    async def endless(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(1000):  # After the connection is gone, nothing is sent any more.
            await send({"type": "http.response.body", "body": b"x" * 100_000, "more_body": True})
        ended.set()

    config = uvicorn.Config(endless, port=0, http=Impatient, ws="none", lifespan="off", log_level="critical")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.02)
    with socket.create_connection(server.servers[0].sockets[0].getsockname()) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        started = time.monotonic()
        assert ended.wait(10), "the server waits for a client that does not read"
        assert 0.4 < time.monotonic() - started < 5
    server.should_exit = True
    thread.join(10)
    assert not thread.is_alive()
