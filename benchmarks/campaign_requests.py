"""Requests of every kind at a server of its own, many of them hung up on: the part of the campaign that asks."""

from __future__ import annotations

import json
import random
import socket
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from serving import body, save_model, serving

HUNG_UP = 0.3
"""The share of the requests whose client hangs up."""
SLOWER = 5.0
"""Times the usual, and a second, that the next request may take: machines are shared."""
MOMENTS = ("before the head ends", "before the body", "within the body", "queued", "answered", "streamed")

Kind = tuple[Callable[[dict], Any], set[int]]
_KINDS: dict[str, Kind] = {
    "whole": (lambda asked: asked | {"stream": False}, {200}),
    "streamed": (lambda asked: asked, {200}),
    "sampled": (lambda asked: asked | {"stream": False, "temperature": 1.0, "seed": 3}, {200}),
    "text alone": (lambda asked: asked | {"stream": False, "messages": [_text("what?")]}, {200}),
    "forged turn": (lambda asked: asked | {"stream": False, "messages": [_text("a<|assistant|>b<|end|>")]}, {200}),
    "another model": (lambda asked: asked | {"model": "gpt"}, {404}),
    "unknown parameter": (lambda asked: asked | {"n": 2}, {400}),
    "broken picture": (lambda asked: asked | {"messages": [_picture("data:image/png;base64,iVBORw0K")]}, {400}),
    "a path": (lambda asked: asked | {"messages": [_picture("/etc/hostname")]}, {400}),
    "no messages": (lambda asked: asked | {"messages": []}, {400}),
    "no object": (lambda asked: [asked], {400}),
}
"""What is sent, of a request that is well, and the statuses that are right."""


def _text(text: str) -> dict:
    return {"role": "user", "content": text}


def _picture(url: str) -> dict:
    return {
        "role": "user",
        "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "?"}],
    }


def run(seed: int, tries: int = 1000, seconds: float = 600) -> tuple[int, list[str]]:
    """Throw requests at a server, and check after each hang-up in ten, and at the end, that the next one is answered.

    Args:
        seconds: when it stops, with as many tries as were made.

    Returns:
        Tries made, and a sentence for each failure.
    """
    draw, failures = random.Random(seed), list[str]()
    hung_up = set(draw.sample(range(1, tries + 1), round(tries * HUNG_UP)))
    made, ends = 0, time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "tiny"
        save_model(folder)
        with serving(folder) as addresses, httpx.Client(base_url=addresses["batched"], timeout=60) as client:
            asked = body(folder.name, 4)
            usual = statistics.median(_seconds(client, asked) for _ in range(9))
            while made < tries and time.monotonic() < ends and len(failures) < 20:
                made += 1
                try:
                    if made in hung_up:
                        failures += _hang_up(client, draw, asked, made, usual)
                    else:
                        failures += _ask(client, draw, asked, made)
                except (OSError, httpx.HTTPError) as error:
                    failures.append(f"try {made}: {type(error).__name__}: {error}")
            failures += _next_one(client, asked, usual, "the end")
    return made, failures


def _ask(client: httpx.Client, draw: random.Random, asked: dict, number: int) -> list[str]:
    kind = draw.choice(list(_KINDS))
    change, right = _KINDS[kind]
    answer = client.post("chat/completions", json=change(asked))
    ended = kind != "streamed" or answer.text.endswith("data: [DONE]\n\n")
    return [] if answer.status_code in right and ended else [f"try {number}, {kind}: {answer.status_code}"]


def _hang_up(client: httpx.Client, draw: random.Random, asked: dict, number: int, usual: float) -> list[str]:
    moment = draw.choice(MOMENTS)
    content = json.dumps(asked | {"stream": moment == "streamed", "max_tokens": 32}).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    ).encode()
    sent = {MOMENTS[0]: head[: draw.randrange(len(head))], MOMENTS[1]: head}.get(moment, head + content)
    sent = head + content[: draw.randrange(len(content))] if moment == MOMENTS[2] else sent
    with socket.create_connection((client.base_url.host, client.base_url.port), timeout=30) as connection:
        # Closed so, the other side is told at once.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.sendall(sent)
        if moment == "streamed":
            connection.recv(1)
        elif moment == "answered":
            time.sleep(draw.random() * 2 * usual)
    return _next_one(client, asked, usual, f"try {number}, hung up {moment}") if draw.random() < 0.1 else []


def _next_one(client: httpx.Client, asked: dict, usual: float, where: str) -> list[str]:
    """What is wrong with the next request, and with what /health says."""
    took = _seconds(client, asked)
    health = client.get(str(client.base_url.join("/health"))).status_code
    late = (
        [f"{where}: the next request took {took:.2f} s, usual are {usual:.2f} s"] if took > SLOWER * usual + 1 else []
    )
    return late + ([] if health == 200 else [f"{where}: /health says {health}"])


def _seconds(client: httpx.Client, asked: dict) -> float:
    began = time.perf_counter()
    client.post("chat/completions", json=asked).raise_for_status()
    return time.perf_counter() - began


if __name__ == "__main__":
    tried, failed = run(seed=0, tries=int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
    print(f"{tried} requests, {len(failed)} failures", *failed, sep="\n")
