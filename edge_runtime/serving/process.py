"""The server process: one engine behind the HTTP interface, until a signal or its parent ends it.

A parent, such as an agent, holds the other end of standard input. Each line is the folder of a
newer version, which the next request is answered with; the end of the input ends the server.
"""

import logging
import os
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec
import uvicorn

from edge_runtime.adapters import learned as learned_
from edge_runtime.adapters.learned import Learned
from edge_runtime.errors import EdgeError, InputError
from edge_runtime.models.facts import Facts
from edge_runtime.serving.app import LOOPBACK, Service, app
from edge_runtime.serving.backends import Backend, load
from edge_runtime.serving.engine import Engine
from edge_runtime.serving.text import Language
from edge_runtime.serving.worker import Worker
from edge_runtime.settings import Weights
from edge_runtime.trainer import meter
from edge_runtime.trainer.job import Machine

log = logging.getLogger(__name__)
WAITING = 32  # requests that may wait for their turn
CONNECTIONS = 64  # beyond what is answered or waits: health, models, refusals
DRAIN_S = 20  # for answers that are being written when the server is told to end


class Endpoint(NamedTuple):
    """Where a server listens."""

    host: str  # a loopback address, unless others may use the server
    port: int  # 0: a free one


class ServedModel(NamedTuple):
    """What a server answers with."""

    facts: Facts
    learned: Learned | None  # None: the base alone
    weights: Weights  # format of the base
    backend: Backend
    context: int  # tokens of a prompt and its answer together
    parallel: int  # answers that are written at once


class ServerEvent(msgspec.Struct, frozen=True):
    """One line of the server's `--json`."""

    phase: str  # listening, version, refused
    version: int
    text: str


def serve(
    model: ServedModel,
    endpoint: Endpoint,
    machine: Machine,
    tell: Callable[[ServerEvent], None],
    *,
    attended: bool,
) -> None:
    """Answer requests until SIGINT, SIGTERM or, if attended, the end of standard input.

    Args:
        model: loaded after the port is taken.
        endpoint: where to listen.
        machine: threads and device.
        tell: gets every event, also from another thread.
        attended: take newer versions from standard input.

    Raises:
        InputError: the port is taken, or as the backend does for the model.
    """
    with _bound(endpoint) as listener:
        meter.prepare(machine)
        facts = model.facts
        engine = load(model.backend, facts, model.learned, model.weights, machine)
        language = Language(facts)
        worker = Worker(engine, language, model.parallel, WAITING)
        name = facts.model_class.rpartition("@")[0]
        service = Service(name, engine, language, worker, model.context, facts.vocabulary)
        config = uvicorn.Config(
            app(service, LOOPBACK if endpoint.host in LOOPBACK else ["*"]),
            http="h11",
            ws="none",
            loop="asyncio",
            log_config=None,
            access_log=False,
            server_header=False,
            limit_concurrency=model.parallel + WAITING + CONNECTIONS,
            timeout_graceful_shutdown=DRAIN_S,
        )
        server = uvicorn.Server(config)
        if attended:
            follow = threading.Thread(target=_follow, args=(server, engine, facts, tell), daemon=True)
            follow.start()
        listener.listen()
        host = f"[{endpoint.host}]" if ":" in endpoint.host else endpoint.host
        text = f"{name} at http://{host}:{listener.getsockname()[1]}/v1"
        tell(ServerEvent("listening", engine.version, text))
        server.run([listener])


def _bound(endpoint: Endpoint) -> socket.socket:
    """A socket that has the port and does not listen yet; InputError where there is none."""
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(*endpoint, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
    except (OSError, OverflowError) as error:
        raise InputError(
            f"cannot listen at {endpoint.host}, port {endpoint.port}: {error}; choose another --port"
        ) from error
    return listener


def _follow(
    server: uvicorn.Server, engine: Engine, facts: Facts, tell: Callable[[ServerEvent], None]
) -> None:
    """Take each newer version that standard input names; at its end, end the server."""
    # unbuffered: a lock of sys.stdin held here would block a normal exit
    with os.fdopen(os.dup(sys.stdin.fileno()), "rb", buffering=0) as lines:
        while line := lines.readline():
            folder = Path(os.fsdecode(line.rstrip(b"\n")))
            try:
                engine.swap(learned_.on(learned_.read(folder), facts))
            # the version before goes on
            except EdgeError as error:
                tell(ServerEvent("refused", engine.version, str(error)))
            else:
                tell(ServerEvent("version", engine.version, f"answers with version {engine.version}"))
    server.should_exit = True
