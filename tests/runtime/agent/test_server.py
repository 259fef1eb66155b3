"""A server that cannot start costs the agent nothing but the wait until the next try."""

import errno
import math
import subprocess
import time
from pathlib import Path

import pytest
from edge_broker import address

from edge_runtime.agent.options import DeviceOptions, ServeOptions
from edge_runtime.agent.server import BaseChoice, Server
from edge_runtime.planning.predict import Serving
from edge_runtime.serving.endpoint import Endpoint


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def server_of(folder, endpoint, post):
    """An agent's server, of a device whose files are in this folder."""
    broker = address.parse("mqtt://127.0.0.1")
    where, limits = (broker, "fleet", "device", folder, folder), (1 << 30, {}, folder, 1, "cpu")
    options = DeviceOptions(*where, *limits, None, 0.0, False)
    return Server(options, ServeOptions(endpoint, Serving(64, 1)), folder / "adapter", post)


@pytest.mark.parametrize("place", ["log", "process"])
def test_a_server_that_cannot_start_is_told_and_tried_again(place, tmp_path, monkeypatch):
    monkeypatch.setattr(*((Path, "open") if place == "log" else (subprocess, "Popen")), full)
    events = []
    server = server_of(tmp_path, Endpoint("127.0.0.1", 0), events.append)
    server.start(BaseChoice("a model", 4, "float32"))
    assert server.tick() == math.inf  # nothing is tried before the failure is taken in
    told = "the server could not start: [Errno 28] No space left on device; it starts again in"
    assert server.ended(events.pop()) == f"{told} 1 s"
    wait_s = server.tick()
    assert 0 < wait_s <= 1 and not events
    time.sleep(wait_s)  # as the agent does, to which the server says when it is due
    server.tick()
    assert server.ended(events.pop()) == f"{told} 2 s"
    server.stop()
    assert server.tick() == math.inf


def test_a_server_listens_where_the_agent_was_told(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(subprocess, "Popen", lambda command, **_: commands.append(command) or full())
    for endpoint in (Endpoint("::1", 8080), Endpoint("127.0.0.1", 8081)):
        server_of(tmp_path, endpoint, print).start(BaseChoice("a model", 4, "float32"))
        where = commands.pop()[-8:-4]
        assert where == ["--host", endpoint.host, "--port", str(endpoint.port)]
