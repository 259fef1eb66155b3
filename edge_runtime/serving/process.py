"""The server process: one engine behind the HTTP interface, until a signal or its parent ends it.

New requests take each newer version that appears in the adapter's folder (follow.py). A parent, such
as an agent, holds the other end of standard input, and its end ends the server.
"""

import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import uvicorn

from edge_runtime.adapters.learned import Learned
from edge_runtime.compat.connections import GivingWay
from edge_runtime.models.facts import Facts
from edge_runtime.serving.app import Service, app
from edge_runtime.serving.backends import load
from edge_runtime.serving.endpoint import Endpoint, unavailable
from edge_runtime.serving.event import ServerEvent
from edge_runtime.serving.follow import Follower
from edge_runtime.serving.text import Language
from edge_runtime.serving.worker import Worker
from edge_runtime.settings import Backend, Weights
from edge_runtime.trainer.heap import release
from edge_runtime.trainer.job import Machine

WAITING = 32  # requests that may wait for their turn
CONNECTIONS = 64  # beyond what is answered or waits: health, models, refusals, clients that send nothing
BACKLOG = 128  # connections accepted at once, beyond the others until what they have sent is read
DRAIN_S = 20  # for answers that are being written when the server is told to end


class ServedModel(NamedTuple):
    """What a server answers with."""

    facts: Facts
    learned: Learned | None  # None: the base alone
    folder: Path | None  # where newer versions appear
    stamp: tuple[int, int]  # of the folder, before `learned` was read
    weights: Weights  # format of the base
    backend: Backend
    context: int  # tokens of a prompt and its answer together, unless the engine has fewer positions
    parallel: int  # answers that are written at once


def serve(
    model: ServedModel,
    endpoint: Endpoint,
    listener: socket.socket,
    machine: Machine,
    tell: Callable[[ServerEvent], None],
    *,
    attended: bool,
) -> None:
    """Answer requests until SIGINT, SIGTERM or, if attended, the end of standard input.

    Args:
        model: loaded here.
        endpoint: where to listen.
        listener: has the endpoint's port (`endpoint.bound`).
        machine: threads and device.
        tell: gets every event, also from another thread.
        attended: whether a parent holds standard input.

    Raises:
        InputError: another server has taken the port, or as the backend does for the model.
    """
    facts = model.facts
    language = Language(facts)
    release()  # loading a tokenizer takes more than it holds, and the weights come now
    engine = load(model.backend, facts, model.learned, model.weights, machine)
    # another server may have bound the port meanwhile, and listens first
    try:
        listener.listen(BACKLOG)
    except OSError as error:
        raise unavailable(endpoint, error) from error
    worker = Worker(engine, language, model.parallel, WAITING)
    name = facts.model_class.rpartition("@")[0]
    context = min(model.context, engine.positions)
    service = Service(name, engine, language, worker, context, facts.vocabulary)
    config = uvicorn.Config(
        app(service, endpoint.host, endpoint.origins),
        http=GivingWay,
        ws="none",
        loop="asyncio",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=model.parallel + WAITING + CONNECTIONS,
        backlog=BACKLOG,
        timeout_graceful_shutdown=DRAIN_S,
    )
    server = uvicorn.Server(config)
    if attended:
        threading.Thread(target=_end_with_stdin, args=(server,), daemon=True).start()
    text = f"{name} at http://{endpoint._replace(port=listener.getsockname()[1])}/v1"
    tell(ServerEvent("listening", engine.version, text))
    if model.folder is not None:
        Follower(engine, facts, model.folder, model.stamp, tell)
    server.run([listener])


def _end_with_stdin(server: uvicorn.Server) -> None:
    """End the server when its parent, which holds the other end of the pipe, has ended."""
    # unbuffered: a lock of sys.stdin held here would block a normal exit
    os.read(0, 1)
    server.should_exit = True
