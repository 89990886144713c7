"""Clients that hang up, at whatever moment (issue 12, entry 1), and many that stay (entries 2 and 4)."""

from __future__ import annotations

import asyncio
import json
import random
import resource
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from serving import WEB, message, running
from test_batching import job

from aki.apps.serve.batching import Batcher
from aki.apps.serve.limits import Limits, Refused
from aki.apps.serve.server import RESERVED, Listener

BODY = json.dumps({"model": "tiny", "messages": [message("how many?")], "max_tokens": 3}).encode()
HEAD = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n"
)


def hang_up(port: int, sent: bytes, wait: float) -> None:
    """Send this, and end the connection so that the other side is told at once."""
    connection = socket.create_connection(("127.0.0.1", port))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.sendall(sent)
    time.sleep(wait)
    connection.close()


def test_the_only_request_is_dropped_while_the_batch_waits_for_others(engine):
    """Entry 1: the batch is empty then, which must not end the thread that answers."""

    async def run():
        batcher = Batcher(engine, Limits())
        with batcher.place():
            gone = job(engine)
            batcher.submit(gone)
            await asyncio.sleep(0.01)
            batcher.drop(gone)
            await asyncio.sleep(0.1)
        one = job(engine, tokens=2)
        batcher.submit(one)
        said = await asyncio.wait_for(anext(one.pieces()), 10)
        assert batcher.alive
        batcher.close()
        return said

    assert asyncio.run(run())


def test_hang_ups_at_any_moment_leave_a_server_that_answers(engine):
    """Entry 1: before the body, in it, while queued, answered and streamed."""
    whole, streamed = HEAD % len(BODY) + BODY, BODY[:-1] + b', "stream": true}'
    streamed = HEAD % len(streamed) + streamed
    draw = random.Random(0)
    moments = [
        (draw.choice([whole, streamed, whole[: draw.randrange(1, len(whole))]]), draw.choice([0, 0, 0.01, 0.03, 0.05]))
        for _ in range(400)
    ]
    with running(engine) as port, ThreadPoolExecutor(8) as pool:
        url = f"http://127.0.0.1:{port}"
        list(pool.map(lambda moment: hang_up(port, *moment), moments))
        began = time.monotonic()
        answer = WEB.post(f"{url}/v1/chat/completions", content=BODY, headers={"Content-Type": "application/json"})
        assert answer.status_code == 200
        assert time.monotonic() - began < 10
        assert WEB.get(f"{url}/health").status_code == 200


def test_health_says_when_nobody_can_answer(engine, monkeypatch):
    """Entry 1: whatever ended the model's thread, who waits is told, /health is 503, and the server still ends."""

    class Ended(BaseException):
        pass

    def end(**_):
        raise Ended

    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    monkeypatch.setattr(engine.model, "generate", end)
    with running(engine) as port:
        post = {"content": BODY, "headers": {"Content-Type": "application/json"}, "timeout": 10}
        url = f"http://127.0.0.1:{port}"
        assert WEB.post(f"{url}/v1/chat/completions", **post).status_code == 500
        assert WEB.get(f"{url}/health").status_code == 503
        assert WEB.post(f"{url}/v1/chat/completions", **post).status_code == 503


def test_health_says_when_a_step_does_not_end(engine, monkeypatch):
    """Entry 1: a thread that lives and is stuck in the model answers nobody; when it goes on, so does the server."""
    monkeypatch.setattr("aki.apps.serve.batching.STUCK", 0.5, raising=False)
    free, within = threading.Event(), threading.Event()

    def hang(*_):
        within.set()
        free.wait(20)

    with running(engine) as port, engine.model.register_forward_pre_hook(hang):
        url, post = f"http://127.0.0.1:{port}", {"content": BODY, "headers": {"Content-Type": "application/json"}}
        said: list[int] = []
        asking = threading.Thread(
            target=lambda: said.append(WEB.post(f"{url}/v1/chat/completions", **post).status_code)
        )
        asking.start()
        try:
            assert within.wait(10)
            assert WEB.get(f"{url}/health").status_code == 200
            time.sleep(0.7)
            assert WEB.get(f"{url}/health").status_code == 503
            assert WEB.post(f"{url}/v1/chat/completions", **post).status_code == 503
        finally:
            free.set()
        asking.join(20)
        assert said == [200]
        assert WEB.get(f"{url}/health").status_code == 200


def test_who_hangs_up_while_pictures_are_read_is_not_read_on(engine, monkeypatch):
    """Entry 3: a request whose client is gone stops costing."""
    asked, ended = threading.Event(), threading.Event()

    def slow(files, limits, is_over):
        asked.set()
        while not is_over():
            time.sleep(0.01)
        ended.set()
        raise Refused(499, "gone", "gone")

    monkeypatch.setattr("aki.apps.serve.app.decoded_images", slow)
    with running(engine) as port:
        hang_up(port, HEAD % len(BODY) + BODY, 0.5)
        assert asked.wait(5)
        assert ended.wait(5), "the reader goes on for nobody"


@pytest.fixture
def few_files(model_folder):
    """`aki serve` as a process that may open 80 files; its address and port."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (80, 80)); from aki.cli import main; main()"
    )
    command = [sys.executable, "-c", code, "serve", str(model_folder), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        address = process.stdout.readline().strip().partition(" answers at ")[2].removesuffix("/v1")
        yield process, address, int(address.rpartition(":")[2])
        process.kill()


def test_more_connections_than_files(few_files):
    """Entry 4: those beyond the limit are refused, those that are there are answered, the log stays empty."""
    process, address, port = few_files
    own = socket.create_connection(("127.0.0.1", port), timeout=10)
    idle = [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(150)]
    refused = idle[-1].recv(65536)
    assert b" 503 " in refused
    assert b"too_many_connections" in refused
    own.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert b" 200 " in own.recv(65536)
    for connection in [own, *idle]:
        connection.close()
    time.sleep(0.5)
    assert WEB.get(f"{address}/health").status_code == 200
    process.terminate()
    assert process.communicate(timeout=30)[1] == ""


def test_a_kept_connection_does_not_wait_for_acknowledgements(few_files):
    """Entry 2: 44 ms each, where it takes one or two."""
    _, address, _ = few_files
    took = []
    with httpx.Client(base_url=address) as client:
        for _ in range(41):
            began = time.perf_counter()
            assert client.get("/health").status_code == 200
            took.append(time.perf_counter() - began)
    assert statistics.median(took) < 0.03


def test_the_limit_of_connections_is_below_the_process_own():
    """Entry 4."""
    with Listener.at("127.0.0.1", 0) as listener:
        assert 0 < listener.most <= resource.getrlimit(resource.RLIMIT_NOFILE)[0] - RESERVED
