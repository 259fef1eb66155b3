"""The HTTP interface before a worker: OpenAI's chats and completions, streamed or whole.

    POST /v1/chat/completions    POST /v1/completions    GET /v1/models    GET /health

The version of the adapter that wrote an answer is its system_fingerprint. A client that goes away
frees its place in the queue and its memory.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from edge_runtime.errors import EdgeError, InputError
from edge_runtime.serving import openai
from edge_runtime.serving.answer import Piece, Question
from edge_runtime.serving.engine import Engine
from edge_runtime.serving.openai import ChatRequest, CompletionRequest, RequestError
from edge_runtime.serving.origin import KnownOrigin
from edge_runtime.serving.text import Language
from edge_runtime.serving.worker import BusyError, Worker

log = logging.getLogger(__name__)
BODY_BYTES = 1 << 20  # of a request, at most
PATHS = "POST /v1/chat/completions, POST /v1/completions, GET /v1/models and GET /health"


class Service(NamedTuple):
    """What the interface answers with."""

    name: str  # of the model, which requests may give
    engine: Engine
    language: Language
    worker: Worker
    context: int  # tokens of a prompt and its answer together
    vocabulary: int  # of the model


def app(service: Service, host: str, origins: tuple[str, ...] = ()) -> Starlette:
    """The interface.

    Args:
        service: its worker is closed when the interface ends.
        host: at which the server listens.
        origins: of web pages that may ask.
    """

    tokenizing = asyncio.Semaphore(1)  # a long prompt takes seconds and hundreds of MiB

    async def health(_: Request) -> Response:
        return _json({"status": "ok", "version": service.engine.version})

    async def models(_: Request) -> Response:
        model = {"id": service.name, "object": "model", "created": 0, "owned_by": "edge-runtime"}
        return _json({"object": "list", "data": [model | {"version": service.engine.version}]})

    async def chat(request: Request) -> Response:
        return await _answer(service, request, openai.read(await _body(request), ChatRequest), tokenizing)

    async def completion(request: Request) -> Response:
        return await _answer(
            service, request, openai.read(await _body(request), CompletionRequest), tokenizing
        )

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.worker.close)

    return Starlette(
        routes=[
            Route("/health", health),
            Route("/v1/models", models),
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/completions", completion, methods=["POST"]),
        ],
        middleware=[
            Middleware(KnownOrigin, host, origins),
            Middleware(
                CORSMiddleware, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["*"]
            ),
        ],
        exception_handlers=dict.fromkeys(
            (RequestError, HTTPException, ClientDisconnect, EdgeError, Exception), _refused
        ),
        lifespan=lifespan,
    )


async def _body(request: Request) -> bytes:
    """The body of a request; raises RequestError where it is large."""
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > BODY_BYTES:
            raise RequestError(413, f"the body has more than {BODY_BYTES} bytes")
    return body


async def _answer(
    service: Service,
    request: Request,
    asked: ChatRequest | CompletionRequest,
    tokenizing: asyncio.Semaphore,
) -> Response:
    if asked.model not in (None, service.name):
        raise RequestError(
            404,
            f"there is no model `{str(asked.model)[:80]}` here: the model is `{service.name}`",
            "model",
            "model_not_found",
        )
    try:
        # a prompt's tokens take a while, in which other requests go on
        async with tokenizing:
            question = await asyncio.to_thread(
                openai.question, asked, service.language, service.context, service.vocabulary
            )
    except InputError as error:
        raise RequestError(400, str(error), "messages") from error
    pieces = _pieces(service.worker, request, question)
    # before a response begins, a failure still has a status
    first = await anext(pieces)
    reply = openai.reply(service.name, chat=isinstance(asked, ChatRequest))
    if asked.stream:
        parts = _parts(reply, first, pieces, len(question.ids), usage=asked.stream_options.include_usage)
        return StreamingResponse(parts, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
    written = [first] if first.finish else [first, *[piece async for piece in pieces]]
    text, last = "".join(piece.text for piece in written), written[-1]
    assert last.finish is not None
    return _json(reply.whole(text, last.finish, len(question.ids), last.tokens, last.version))


async def _pieces(worker: Worker, request: Request, question: Question) -> AsyncIterator[Piece]:
    """The pieces of an answer; raises RequestError, or ClientDisconnect when nobody waits for them."""
    loop, queue = asyncio.get_running_loop(), asyncio.Queue[Piece | Exception]()
    try:
        submitted = worker.submit(question, lambda item: loop.call_soon_threadsafe(queue.put_nowait, item))
    except BusyError as error:
        raise RequestError(429, str(error), code="rate_limit_exceeded") from error

    def leave(_: object) -> None:
        worker.cancel(submitted)
        queue.put_nowait(ClientDisconnect())

    gone = asyncio.create_task(_gone(request))
    gone.add_done_callback(leave)
    try:
        while True:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            yield item
            if item.finish:
                return
    finally:
        gone.cancel()


async def _gone(request: Request) -> None:
    """Wait until the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _parts(
    reply: openai.Reply, first: Piece, pieces: AsyncIterator[Piece], prompt: int, *, usage: bool
) -> AsyncIterator[bytes]:
    """The events of a streamed answer."""
    if reply.chat:
        yield _event(reply.part("", None, first.version, first=True))
    piece = first
    try:
        while True:
            if piece.text:
                yield _event(reply.part(piece.text, None, piece.version))
            if piece.finish:
                break
            piece = await anext(pieces)
    except ClientDisconnect:
        return
    except Exception as error:
        yield _event(_error(error).body())
        return
    yield _event(reply.part(None, piece.finish, piece.version))
    if usage:
        yield _event(reply.last(prompt, piece.tokens, piece.version))
    yield b"data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(content) + b"\n\n"


def _json(content: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(content), status, headers, media_type="application/json")


async def _refused(_: Request, error: Exception) -> Response:
    refused = _error(error)
    headers = {"Retry-After": "1"} if refused.status in (429, 503) else None
    return _json(refused.body(), refused.status, headers)


def _error(error: Exception) -> RequestError:
    """Any failure in OpenAI's form; the reason of one that is not expected stays in the log."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, HTTPException):
        return RequestError(error.status_code, f"{error.detail}: this server has {PATHS}")
    if isinstance(error, ClientDisconnect):
        return RequestError(499, "the client went away")  # which nobody reads
    if isinstance(error, EdgeError):
        return RequestError(500, str(error))
    log.error("an answer failed", exc_info=error)
    return RequestError(500, "the answer failed; the server's log has the reason")
