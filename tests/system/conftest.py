"""A broker for the session, the demo's real model cut to a few layers, and a fleet a test."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from edge_broker.local import Broker, start_broker
from fleet import Fleet

from edge_runtime import processes
from edge_runtime.demo import model


@pytest.fixture(scope="session")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    with start_broker(state_dir=tmp_path_factory.mktemp("broker")) as running:
        yield running


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def real_model(cache: Path) -> str:
    """The demo's GGUF file, prepared; at a depth of 2 a round of a few steps takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGE_RUNTIME_CACHE", str(cache))
        processes.prepared(str(model.path()), Path())
        processes.runtime_bytes()
    return str(model.path())


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"say {n}: ", "completion": f"{n} {n}"}) + "\n" for n in range(40)))
    return path


@pytest.fixture
def fleet(broker: Broker, cache: Path, tmp_path: Path, rows: Path, request: pytest.FixtureRequest) -> Iterator[Fleet]:
    name = f"system-{abs(hash(request.node.nodeid)) % 10**10}"
    found = Fleet(broker, cache, tmp_path, rows, name)
    yield found
    for command in found.running:
        command.kill()
