"""The application: OpenAI's chat completions over one model."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Collection, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from threading import Event
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.exceptions import HTTPException

from aki.apps.serve.batching import Batcher
from aki.apps.serve.engine import Engine
from aki.apps.serve.gate import Gate
from aki.apps.serve.images import decoded_images, image_files
from aki.apps.serve.job import Job, Sampler
from aki.apps.serve.limits import Limits, Refused, failed, unable
from aki.apps.serve.memory import give_back
from aki.apps.serve.metrics import Metrics
from aki.apps.serve.schema import ChatRequest, usage
from aki.apps.serve.text import AnswerText

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_DECODERS = 2  # Threads that decode images; each may hold those of one request.


_GONE = 499  # What nginx notes of a client that hung up; nobody is there to read it.


class Service:
    """What the routes share while the server runs."""

    def __init__(self, engine: Engine, limits: Limits, remote_images: bool, metrics: Metrics):
        self.engine, self.limits, self.remote_images, self.metrics = engine, limits, remote_images, metrics
        self.started = int(time.time())
        # Text has a thread of its own, so that it never waits for pictures.
        self.readers = {
            with_images: ThreadPoolExecutor(threads, thread_name_prefix="read")
            for with_images, threads in ((False, 1), (True, _DECODERS))
        }
        self.batcher = Batcher(engine, limits, metrics.batch.observe)
        metrics.watch(lambda: len(self.batcher.waiting))

    def close(self) -> None:
        self.batcher.close()
        for readers in self.readers.values():
            readers.shutdown(cancel_futures=True)

    async def job(self, chat: ChatRequest) -> Job:
        """The request, waiting for the model.

        Raises:
            Refused: it is not one that can be answered.
        """
        self.engine.check_name(chat.model)
        with self.batcher.place(pictures=bool(chat.images())):
            job = await self._prepared(chat)
            self.batcher.submit(job)
        return job

    async def _prepared(self, chat: ChatRequest) -> Job:
        urls, limits = chat.images(), self.limits
        if len(urls) > limits.max_images:
            message = f"the request has {len(urls)} images, this server takes up to {limits.max_images}."
            raise Refused(400, message, "too_many_images", "messages")
        files = await image_files(urls, limits, self.remote_images)
        loop, over = asyncio.get_running_loop(), Event()
        try:
            inputs = await loop.run_in_executor(self.readers[bool(files)], self._inputs, chat, files, over)
        finally:
            over.set()  # Cancelled, the thread that reads would go on.
        sampler = Sampler(chat.temperature, chat.top_p, chat.seed) if chat.temperature else None
        return Job(
            inputs,
            self.engine.new_tokens(chat, inputs["input_ids"].shape[1], limits),
            AnswerText(self.engine.tokenizer, chat.stop or []),
            self.engine.end_tokens,
            sampler,
        )

    def _inputs(self, chat: ChatRequest, files: list[bytes], over: Event) -> dict[str, Any]:
        try:
            return self.engine.inputs(chat, decoded_images(files, self.limits, over.is_set))
        finally:
            if files:
                give_back()

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


def build_app(
    engine: Engine,
    limits: Limits,
    *,
    remote_images: bool = False,
    api_key: str | None = None,
    hosts: Collection[str] = (),
) -> FastAPI:
    """The ASGI application of a model.

    Args:
        remote_images: whether http(s) URLs of images are fetched, from public addresses.
        api_key: what clients must send; None lets everybody in.
        hosts: what their Host header may name; none given, anything.
    """
    metrics = Metrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.service = service = Service(engine, limits, remote_images, metrics)
        yield
        service.close()

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Gate, limits=limits, metrics=metrics, api_key=api_key, hosts=hosts)
    app.add_exception_handler(Refused, _on_refused)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http)

    def route(path: str) -> Callable:
        return app.api_route(path, methods=["GET", "HEAD"])

    def model_card(service: Service) -> dict[str, Any]:
        return {"id": engine.name, "object": "model", "created": service.started, "owned_by": "aki"}

    @route("/health")
    async def health(request: Request) -> dict[str, str]:
        if not request.app.state.service.batcher.alive:
            raise unable()
        return {"status": "ok"}

    @route("/metrics")
    async def numbers() -> Response:
        return PlainTextResponse(metrics.text(), media_type="text/plain; version=0.0.4")

    @route("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        return {"object": "list", "data": [model_card(request.app.state.service)]}

    @route("/v1/models/{name:path}")
    async def one_model(name: str, request: Request) -> dict[str, Any]:
        engine.check_name(name)
        return model_card(request.app.state.service)

    @app.post("/v1/chat/completions")
    async def complete(chat: ChatRequest, request: Request) -> Response:
        service: Service = request.app.state.service
        job = await _unless_gone(request, service.job(chat))
        if job is None:
            return Response(status_code=_GONE)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": engine.name}
        if chat.stream:
            with_usage = chat.stream_options is not None and chat.stream_options.include_usage
            return EventStream(service, job, _events(service, job, head, with_usage))
        return await _whole(service, job, head, request)

    return app


async def _whole(service: Service, job: Job, head: dict[str, Any], request: Request) -> Response:
    async def read() -> str:
        return "".join([piece async for piece in service.pieces(job)])

    try:
        text = await _unless_gone(request, read())
    except Exception as error:
        logger.debug("failed", exc_info=error)
        raise failed() from error
    finally:
        service.done(job)
    if text is None:
        return Response(status_code=_GONE)
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": job.finish}
    spent = usage(job.prompt_tokens, job.tokens)
    return JSONResponse({**head, "object": "chat.completion", "choices": [choice], "usage": spent})


async def _unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result | None:
    """What the work gives; None if the client hangs up before, and then the work is cancelled."""
    working, gone = asyncio.create_task(work), asyncio.create_task(_hung_up(request))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        gone.cancel()


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
    at_fault = first.get("ctx", {}).get("param")
    where = ".".join(str(step) for step in first["loc"][1:])
    said = first["msg"].removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        where, said = "", "this is not JSON"
    elif first["type"] in ("model_attributes_type", "missing") and not where:
        said = "send a JSON object, with Content-Type: application/json"
    message = f"{where or at_fault or 'the body'}: {said}."
    return await _on_refused(request, Refused(400, message, "invalid_request", where or at_fault))


async def _on_http(request: Request, error: Any) -> Response:
    return await _on_refused(request, Refused(error.status_code, f"{error.detail}.", "http_error", None, error.headers))
