"""Requests a second, time to the first token and between tokens: `aki serve` batching, against one request at a time.

Both servers run side by side on the same model with random weights and take turns, so that a noisy machine disturbs
both alike. A client sends one request after the other: a picture, a question, an answer of a fixed number of tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import httpx
import torch
from PIL import Image

from aki.training.recipe import load_recipe
from aki.training.stages import build_model

RECIPE = "digits"
CLIENTS = (1, 8, 32)
MODES = {"batched": 32, "sequential": 1}
"""What --max-batch is."""


@dataclass
class Times:
    """Seconds of all requests of one mode and number of clients."""

    rates: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)


def save_model(folder: Path) -> int:
    """The digits recipe's model, untrained; it never ends an answer by itself. Returns its parameters."""
    torch.manual_seed(0)
    model, processor = build_model(load_recipe(RECIPE))
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


@contextmanager
def serving(folder: Path) -> Iterator[dict[str, str]]:
    """mode -> the address of a server in a process of its own."""
    command = [sys.executable, "-m", "aki", "serve", str(folder), "--port", "0", "--max-batch"]
    processes = {
        mode: subprocess.Popen([*command, str(size)], stdout=subprocess.PIPE, text=True) for mode, size in MODES.items()
    }
    try:
        yield {mode: _address(process) for mode, process in processes.items()}
    finally:
        for process in processes.values():
            process.terminate()
        for process in processes.values():
            process.wait()


def _address(process: subprocess.Popen) -> str:
    assert process.stdout is not None
    address = process.stdout.readline().strip().partition(" answers at ")[2]
    if not address:
        raise RuntimeError(f"the server did not start: {process.args!r}")
    return address


def body(name: str, tokens: int) -> dict:
    picture = io.BytesIO()
    Image.new("RGB", (96, 96), "red").save(picture, "PNG")
    url = "data:image/png;base64," + base64.b64encode(picture.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "how many digits are red?"}]
    messages = [{"role": "user", "content": content}]
    return {"model": name, "messages": messages, "max_tokens": tokens, "stream": True}


async def ask(client: httpx.AsyncClient, request: dict, times: Times) -> None:
    """One request; a piece of text is a token, or several that came while the server was busy."""
    started = time.perf_counter()
    stamps = []
    async with client.stream("POST", "chat/completions", json=request) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if '"content": "' in line and '"role"' not in line:
                stamps.append(time.perf_counter())
    if not stamps:
        raise RuntimeError("the server gave an empty answer.")
    times.first.append(stamps[0] - started)
    times.between += [later - earlier for earlier, later in pairwise(stamps)]


async def one_round(address: str, request: dict, clients: int, requests: int, times: Times) -> None:
    """`requests` requests by `clients` clients at once."""
    left = iter(range(requests))
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=address, timeout=120, limits=limits) as client:

        async def work() -> None:
            for _ in left:
                await ask(client, request, times)

        started = time.perf_counter()
        await asyncio.gather(*(work() for _ in range(clients)))
        times.rates.append(requests / (time.perf_counter() - started))


def measure(addresses: dict[str, str], clients: int, request: dict, requests: int, rounds: int) -> list[dict]:
    """A row a mode."""
    times = {mode: Times() for mode in MODES}
    for number in range(rounds):
        for mode in list(MODES)[:: 1 if number % 2 else -1]:
            asyncio.run(one_round(addresses[mode], request, clients, requests, times[mode]))
    return [
        {
            "clients": clients,
            "mode": mode,
            "requests_per_s": statistics.median(seen.rates),
            "ttft_p50": statistics.median(seen.first),
            "ttft_p95": statistics.quantiles(seen.first, n=20, method="inclusive")[-1],
            "itl_p50": statistics.median(seen.between),
            "itl_p95": statistics.quantiles(seen.between, n=20, method="inclusive")[-1],
            "new_tokens": request["max_tokens"],
        }
        for mode, seen in times.items()
    ]


def show(rows: list[dict]) -> None:
    for row in rows:
        ratio = row["requests_per_s"] / rows[-1]["requests_per_s"]
        times = "{ttft_p50:.3f} | {ttft_p95:.3f} | {itl_p50:.4f} | {itl_p95:.4f}".format(**row)
        print(
            "| {clients} | {mode} | {requests_per_s:.1f}".format(**row),
            f"{ratio:.1f} | {times} |",
            sep=" | ",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer requests")
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    options = parser.parse_args()
    tokens, each, rounds = (16, 1, 1) if options.quick else (32, 2, 5)
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "tiny"
        parameters = save_model(folder)
        request = body(folder.name, tokens)
        with serving(folder) as addresses:
            print(f"{parameters:,} parameters, {tokens} new tokens a request; seconds, median and 95 %\n")
            print("| clients | mode | requests/s | ratio | first token | 95 % | between tokens | 95 % |")
            print("| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)
            for address in addresses.values():
                asyncio.run(one_round(address, request, 2, 4, Times()))
            for clients in CLIENTS:
                rows += measure(addresses, clients, request, max(4, each * clients), rounds)
                show(rows[-len(MODES) :])
                if options.json:
                    options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
