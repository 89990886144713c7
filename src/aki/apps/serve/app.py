"""The application: OpenAI's chat completions over one model."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.exceptions import HTTPException

from aki.apps.serve.batching import Batcher
from aki.apps.serve.engine import Engine
from aki.apps.serve.gate import Gate
from aki.apps.serve.images import decoded_image, image_files
from aki.apps.serve.job import Job, Sampler
from aki.apps.serve.limits import Limits, Refused, failed
from aki.apps.serve.metrics import Metrics
from aki.apps.serve.schema import ChatRequest, usage
from aki.apps.serve.text import AnswerText

logger = logging.getLogger(__name__)

_DECODERS = 2  # Threads that decode images; each may hold one of the largest size.


class Service:
    """What the routes share while the server runs."""

    def __init__(self, engine: Engine, limits: Limits, remote_images: bool, metrics: Metrics):
        self.engine, self.limits, self.remote_images, self.metrics = engine, limits, remote_images, metrics
        self.started = int(time.time())
        self.readers = ThreadPoolExecutor(_DECODERS, thread_name_prefix="read")
        self.batcher = Batcher(engine, limits, metrics.batch.observe)
        metrics.watch(lambda: len(self.batcher.waiting))

    def close(self) -> None:
        self.batcher.close()
        self.readers.shutdown(cancel_futures=True)

    async def job(self, chat: ChatRequest) -> Job:
        """The request, waiting for the model.

        Raises:
            Refused: it is not one that can be answered.
        """
        if chat.model != self.engine.name:
            message = f"this server has the model {self.engine.name!r}, not {chat.model[:100]!r}."
            raise Refused(404, message, "model_not_found", "model")
        with self.batcher.place():
            job = await self._prepared(chat)
            self.batcher.submit(job)
        return job

    async def _prepared(self, chat: ChatRequest) -> Job:
        urls, limits = chat.images(), self.limits
        if len(urls) > limits.max_images:
            message = f"the request has {len(urls)} images, this server takes up to {limits.max_images}."
            raise Refused(400, message, "too_many_images", "messages")
        files = await image_files(urls, limits, self.remote_images)
        loop = asyncio.get_running_loop()
        inputs = await loop.run_in_executor(self.readers, self._inputs, chat, files)
        sampler = Sampler(chat.temperature, chat.top_p, chat.seed) if chat.temperature else None
        return Job(
            inputs,
            self.engine.new_tokens(chat, inputs["input_ids"].shape[1], limits),
            AnswerText(self.engine.tokenizer, chat.stop or []),
            self.engine.end_tokens,
            sampler,
        )

    def _inputs(self, chat: ChatRequest, files: list[bytes]) -> dict[str, Any]:
        return self.engine.inputs(chat, [decoded_image(file, self.limits) for file in files])

    async def pieces(self, job: Job) -> AsyncIterator[str]:
        first = True
        async for piece in job.pieces():
            if first:
                self.metrics.first_token.observe(time.monotonic() - job.arrived)
            first = False
            yield piece

    def done(self, job: Job) -> None:
        """Nobody waits for this answer any more, because it is there or because nobody is there."""
        self.batcher.drop(job)
        self.metrics.tokens.inc(job.tokens)


class EventStream(StreamingResponse):
    """An answer piece by piece; it is not worked on any longer than somebody listens."""

    def __init__(self, service: Service, job: Job, events: AsyncIterator[str]):
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._service, self._job = service, job

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._service.done(self._job)


def build_app(engine: Engine, limits: Limits, *, remote_images: bool = False, api_key: str | None = None) -> FastAPI:
    """The ASGI application of a model.

    Args:
        remote_images: whether http(s) URLs of images are fetched, from public addresses.
        api_key: what clients must send; None lets everybody in.
    """
    metrics = Metrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.service = service = Service(engine, limits, remote_images, metrics)
        yield
        service.close()

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Gate, limits=limits, metrics=metrics, api_key=api_key)
    app.add_exception_handler(Refused, _on_refused)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics")
    async def numbers() -> Response:
        return PlainTextResponse(metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        created = request.app.state.service.started
        model = {"id": engine.name, "object": "model", "created": created, "owned_by": "aki"}
        return {"object": "list", "data": [model]}

    @app.post("/v1/chat/completions")
    async def complete(chat: ChatRequest, request: Request) -> Response:
        service: Service = request.app.state.service
        job = await service.job(chat)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": engine.name}
        if chat.stream:
            with_usage = chat.stream_options is not None and chat.stream_options.include_usage
            return EventStream(service, job, _events(service, job, head, with_usage))
        return await _whole(service, job, head, request)

    return app


async def _whole(service: Service, job: Job, head: dict[str, Any], request: Request) -> Response:
    async def read() -> str:
        return "".join([piece async for piece in service.pieces(job)])

    answer, gone = asyncio.create_task(read()), asyncio.create_task(_hung_up(request))
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            return Response(status_code=499)
        text = answer.result()
    except Exception as error:
        logger.debug("failed", exc_info=error)
        raise failed() from error
    finally:
        answer.cancel()
        gone.cancel()
        service.done(job)
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": job.finish}
    spent = usage(job.prompt_tokens, job.tokens)
    return JSONResponse({**head, "object": "chat.completion", "choices": [choice], "usage": spent})


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _events(service: Service, job: Job, head: dict[str, Any], with_usage: bool) -> AsyncIterator[str]:
    """The lines of a stream as OpenAI writes them."""

    def event(delta: dict[str, str], finish: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        return _line({**head, "object": "chat.completion.chunk", "choices": [choice]})

    yield event({"role": "assistant", "content": ""})
    try:
        async for piece in service.pieces(job):
            yield event({"content": piece})
    except Exception as error:
        logger.debug("failed", exc_info=error)
        yield _line(failed().body)
        return
    yield event({}, job.finish)
    if with_usage:
        spent = usage(job.prompt_tokens, job.tokens)
        yield _line({**head, "object": "chat.completion.chunk", "choices": [], "usage": spent})
    yield "data: [DONE]\n\n"


def _line(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


async def _on_refused(request: Request, refused: Any) -> Response:
    return JSONResponse(refused.body, refused.status, refused.headers)


async def _on_invalid(request: Request, error: Any) -> Response:
    first = error.errors()[0]
    where = ".".join(str(step) for step in first["loc"][1:])
    said = first["msg"].removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        where, said = "", "this is not JSON"
    elif first["type"] in ("model_attributes_type", "missing") and not where:
        said = "send a JSON object, with Content-Type: application/json"
    message = f"{where or 'the body'}: {said}."
    return await _on_refused(request, Refused(400, message, "invalid_request", where or None))


async def _on_http(request: Request, error: Any) -> Response:
    return await _on_refused(request, Refused(error.status_code, f"{error.detail}.", "http_error"))
