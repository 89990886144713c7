"""Models to serve, servers in a thread, and clients."""

from __future__ import annotations

import base64
import functools
import io
import threading
from contextlib import contextmanager

import httpx
import torch
import uvicorn
from openai import OpenAI
from PIL import Image

from aki.apps.serve.app import build_app
from aki.apps.serve.limits import Limits
from aki.apps.serve.server import ImpatientProtocol

WEB = httpx.Client(verify=False, timeout=30, limits=httpx.Limits(max_keepalive_connections=0))
"""A connection a request; made once, because reading certificates takes longer than most requests here."""


@contextmanager
def running(engine, limits=None, **options):
    """The server on a free port, in a thread; gives its port."""
    limits = limits or Limits()
    protocol = type("Protocol", (ImpatientProtocol,), {"patience": limits.patience})
    app = build_app(engine, limits, **options)
    server = uvicorn.Server(uvicorn.Config(app, port=0, http=protocol, ws="none", log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.02)
        assert thread.is_alive(), "the server did not start"
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive(), "the server did not end"


@functools.cache
def client(port: int) -> OpenAI:
    return OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60)


def picture_bytes(shade: int = 0, size: tuple[int, int] = (30, 20), form: str = "PNG") -> bytes:
    image = Image.new("RGB", size, (shade, 255 - shade, (shade * 7) % 256))
    image.paste((255, 255, 255), (0, 0, size[0] // 2, size[1] // (1 + shade % 3)))
    out = io.BytesIO()
    image.save(out, form)
    return out.getvalue()


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def message(text: str, *urls: str) -> dict:
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": "user", "content": [*images, {"type": "text", "text": text}]}


def make_lively(model) -> None:
    """Weights that are large enough for what a row sees to change what it says, and no early end."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.3)
