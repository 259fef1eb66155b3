"""What a new version costs a server: a hundred come from their folders while two clients ask.

The server is `edge-runtime serve`, which an agent tells of newer versions in the same way.
"""

import itertools
import json
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
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
from edge_runtime.serving.backends import Backend
from edge_runtime.settings import Weights

RANK, VERSIONS, CLIENTS = 16, 100, 2


class Swaps(msgspec.Struct):
    """A server that takes new versions while clients ask."""

    seconds: list[float]  # from a version's folder to the server's word that the next request has it
    answers: int
    lost: int


def swaps(backend: Backend, weights: Weights) -> Swaps:
    """Ask a server with two clients while a hundred versions come."""
    facts = processes.prepared(str(demo.path()), Path.cwd())
    result, ended = Swaps([], 0, 0), threading.Event()
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch) / str(version) for version in (1, 2, 3)]
        for version, folder in enumerate(folders, 1):
            learned_.write(adapter(facts, version), folder)
        with _server(backend, weights, folders[0]) as server:
            url = json.loads(server.stdout.readline())["text"].split(" at ")[1]
            clients = [threading.Thread(target=_ask, args=(url, result, ended)) for _ in range(CLIENTS)]
            for client in clients:
                client.start()
            for _, folder in zip(range(VERSIONS), itertools.cycle(folders), strict=False):
                began = time.perf_counter()
                server.stdin.write(f"{folder}\n")
                server.stdin.flush()
                if json.loads(server.stdout.readline())["phase"] != "version":
                    result.lost += 1
                result.seconds.append(time.perf_counter() - began)
            ended.set()
            for client in clients:
                client.join()
    return result


@contextmanager
def _server(backend: Backend, weights: Weights, folder: Path) -> Iterator[Any]:
    command = [sys.executable, "-m", "edge_runtime.cli", "serve", "--backend", backend, "--weights", weights]
    command += ["--adapter", str(folder), "--threads", "2", "--port", "0", "--attended", "--json"]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield server
    finally:
        server.communicate()  # the end of its input ends the server


def _ask(url: str, result: Swaps, ended: threading.Event) -> None:
    body = json.dumps({"model": "any", "prompt": "The weather today is", "max_tokens": 8}).encode()
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
