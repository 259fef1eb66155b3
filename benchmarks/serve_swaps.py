"""What a new version costs a server: a hundred appear in its adapter's folder while two clients ask.

The server is `edge-runtime serve`, which looks for a newer version a few times a second, as beside an
agent. What a swap itself takes is measured before, in an engine without requests.
"""

import json
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from edge_runtime.adapters import learned as learned_
from edge_runtime.adapters.learned import Learned
from edge_runtime.demo import model as demo
from edge_runtime.models.facts import Facts
from edge_runtime.planning import processes
from edge_runtime.serving.backends import load
from edge_runtime.settings import Backend, Weights
from edge_runtime.trainer.job import Machine

RANK, VERSIONS, CLIENTS = 16, 100, 2


class Swaps(msgspec.Struct):
    """Seconds of new versions, and what became of the requests meanwhile."""

    swap_s: list[float]  # to read a version's folder and give it to an engine
    appear_s: list[float]  # from a written folder to the server's word that new requests have it
    answers: int = 0
    lost: int = 0


def swaps(backend: Backend, weights: Weights) -> Swaps:
    """Ask a server with two clients while a hundred versions come."""
    facts = processes.prepared(str(demo.path()), Path.cwd())
    versions, ended = [adapter(facts, version) for version in (1, 2, 3)], threading.Event()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "adapter"
        learned_.write(versions[0], folder)
        engine = load(backend, facts, versions[0], weights, Machine(2, "cpu"))
        result = Swaps([_seconds(lambda: engine.swap(learned_.read(folder))) for _ in range(20)], [])
        with _server(backend, weights, folder) as server:
            name, url = json.loads(server.stdout.readline())["text"].split(" at ")
            clients = [threading.Thread(target=_ask, args=(url, name, result, ended)) for _ in range(CLIENTS)]
            for client in clients:
                client.start()
            try:
                for number in range(2, VERSIONS + 2):
                    learned_.write(versions[number % 3]._replace(version=number), folder)
                    result.appear_s.append(_seconds(lambda number=number: _wait(server, number)))
            finally:  # else the clients would ask for ever
                ended.set()
                for client in clients:
                    client.join()
    return result


def _seconds(deed: Callable[[], object]) -> float:
    began = time.perf_counter()
    deed()
    return time.perf_counter() - began


def _wait(server: Any, version: int) -> None:
    """Wait until the server answers with a version."""
    event = json.loads(server.stdout.readline())
    if (event["phase"], event["version"]) != ("version", version):
        raise RuntimeError(f"the server should take version {version}, but says: {event['text']}")


@contextmanager
def _server(backend: Backend, weights: Weights, folder: Path) -> Iterator[Any]:
    command = [sys.executable, "-m", "edge_runtime.cli", "serve", "--backend", backend, "--weights", weights]
    command += ["--adapter", str(folder), "--threads", "2", "--port", "0", "--attended", "--json"]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield server
    finally:
        server.communicate()  # the end of its input ends the server


def _ask(url: str, name: str, result: Swaps, ended: threading.Event) -> None:
    body = json.dumps({"model": name, "prompt": "The weather today is", "max_tokens": 8}).encode()
    while not ended.is_set():
        request = urllib.request.Request(f"{url}/completions", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                json.load(answer)["choices"][0]["text"]
                result.answers += 1
        except (OSError, ValueError, LookupError):
            result.lost += 1


def adapter(facts: Facts, version: int = 1) -> Learned:
    """A random adapter, which changes the logits a little."""
    draw, layers = np.random.default_rng(version), tuple(range(facts.layers))
    factors = {
        (layer, role): (
            draw.normal(0, into**-0.5, (RANK, into)).astype(np.float32),
            draw.normal(0, 1e-3, (out, RANK)).astype(np.float32),
        )
        for layer in layers
        for role, (out, into) in facts.linears.items()
    }
    return Learned(facts, layers, factors, version, str(demo.path()))
