"""A server of a tiny model, its clients, and versions of what was learned on it."""

import http.client
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from fleet import Command

from edge_runtime.adapters.learned import Learned
from edge_runtime.models.facts import Facts

HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}  # of the same matrices
TEMPLATE = (
    "{% for turn in messages %}{{ turn['role'] }}: {{ turn['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def chatting(tiny_model: Path, folder: Path) -> Path:
    """A copy of the tiny model with a chat template, room for long answers, and heads that a graph can have."""
    shutil.copytree(tiny_model, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8192} | HEADS))
    return folder


def version(facts: Facts, number: int, layers: tuple[int, ...] | None = None, rank: int = 2) -> Learned:
    """A random adapter, which writes other text than any other version. layers: None: all."""
    random, layers = np.random.default_rng(number), layers or tuple(range(facts.layers))
    factors = {
        (layer, role): (
            random.normal(0, 0.5, (rank, into)).astype(np.float32),
            random.normal(0, 0.5, (out, rank)).astype(np.float32),
        )
        for layer in layers
        for role, (out, into) in facts.linears.items()
    }
    return Learned(facts, layers, factors, number, facts.source)


class Client:
    """Talks to a server on this machine."""

    def __init__(self, port: int) -> None:
        self.port = port

    def connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)

    def raw(
        self, method: str, path: str, body: bytes | None = None, **headers: str
    ) -> tuple[int, dict[str, Any]]:
        """Status and JSON of a response."""
        connection = self.connection()
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        content = response.read()
        connection.close()
        return response.status, json.loads(content)

    def get(self, path: str) -> dict[str, Any]:
        status, content = self.raw("GET", path)
        assert status == 200
        return content

    def ask(self, path: str, **fields: Any) -> tuple[int, dict[str, Any]]:
        return self.raw("POST", f"/v1/{path}", json.dumps(fields).encode())

    def begin(self, path: str, **fields: Any) -> http.client.HTTPConnection:
        """Send a request, and leave its answer to be read."""
        connection = self.connection()
        connection.request("POST", f"/v1/{path}", json.dumps(fields))
        return connection

    def events(self, path: str, **fields: Any) -> list[dict[str, Any]]:
        """The events of a streamed answer that came to its end."""
        connection = self.begin(path, stream=True, **fields)
        events = list(events_of(connection))
        connection.close()
        return events


def events_of(connection: http.client.HTTPConnection) -> Iterator[dict[str, Any]]:
    """Events as they come; fails where the last is not the mark of the end."""
    response = connection.getresponse()
    assert response.status == 200, response.read()
    for line in response:
        if line == b"data: [DONE]\n":
            return
        if line.strip():
            yield json.loads(line.removeprefix(b"data: "))
    raise AssertionError("the answer has no end")


@contextmanager
def server(model: Path, cache: Path, *more: str) -> Iterator[tuple[Command, Client]]:
    """A server that listens, and its client."""
    command = Command(
        *("serve", "--model", str(model), "--weights", "float32", "--port", "0", "--threads", "1"),
        *("--json", *more),
        cache=cache,
    )
    try:
        url = command.phase("listening")["text"]
        yield command, Client(int(url.rpartition(":")[2].partition("/")[0]))
    finally:
        command.kill()
