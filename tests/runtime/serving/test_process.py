"""What a server process refuses after it has loaded a model."""

import socket

import pytest

from edge_runtime.errors import InputError
from edge_runtime.serving import process
from edge_runtime.serving.endpoint import Endpoint, bound
from edge_runtime.serving.process import ServedModel, serve
from edge_runtime.trainer.job import Machine


def test_of_two_servers_that_load_at_once_the_later_is_told_of_the_port(tiny_facts, monkeypatch):
    """A bound port may be bound again until one of the two listens."""
    model = ServedModel(tiny_facts, None, None, (0, 0), "bfloat16", "torch", 64, 1)
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]
        monkeypatch.setattr(process, "load", lambda *_: other.listen())
        where = Endpoint("127.0.0.1", port)
        with (
            bound(where) as listener,
            pytest.raises(InputError, match=f"cannot listen at 127.0.0.1:{port}: .*another port"),
        ):
            serve(model, where, listener, Machine(), print, attended=False)
