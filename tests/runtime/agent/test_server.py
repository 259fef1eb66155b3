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


@pytest.mark.parametrize("place", ["log", "process"])
def test_a_server_that_cannot_start_is_told_and_tried_again(place, tmp_path, monkeypatch):
    monkeypatch.setattr(*((Path, "open") if place == "log" else (subprocess, "Popen")), full)
    options = DeviceOptions(
        *(
            address.parse("mqtt://127.0.0.1"),
            "fleet",
            "device",
            tmp_path,
            tmp_path,
            1 << 30,
            {},
            tmp_path,
            1,
            "cpu",
        ),
        *(None, 0.0, False),
    )
    events = []
    serve = ServeOptions(Endpoint("127.0.0.1", 0), Serving(64, 1))
    server = Server(options, serve, tmp_path / "adapter", events.append)
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
