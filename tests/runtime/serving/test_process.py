"""What a server process refuses before it loads a model."""

import socket

import pytest

from edge_runtime.errors import InputError
from edge_runtime.serving import process
from edge_runtime.serving.process import Endpoint, ServedModel, serve
from edge_runtime.trainer.job import Machine


def test_a_port_that_is_taken_is_told_before_the_model_is_loaded(demo_facts):
    model = ServedModel(demo_facts, None, None, (0, 0), "bfloat16", "torch", 64, 1)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"cannot listen at 127.0.0.1, port {port}: .*--port"):
            serve(model, Endpoint("127.0.0.1", port), Machine(), print, attended=False)


def test_of_two_servers_that_load_at_once_the_later_is_told_of_the_port(tiny_facts, monkeypatch):
    """A bound port may be bound again until one of the two listens."""
    model = ServedModel(tiny_facts, None, None, (0, 0), "bfloat16", "torch", 64, 1)
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]
        monkeypatch.setattr(process, "load", lambda *_: other.listen())
        with pytest.raises(InputError, match=f"cannot listen at 127.0.0.1, port {port}: .*--port"):
            serve(model, Endpoint("127.0.0.1", port), Machine(), print, attended=False)


@pytest.mark.parametrize("host", ["..", "a" * 64 + ".example"])
def test_a_name_that_is_none_is_told(host, demo_facts):
    model = ServedModel(demo_facts, None, None, (0, 0), "bfloat16", "torch", 64, 1)
    with pytest.raises(InputError, match=f"cannot listen at {host}, port 0: .*--host"):
        serve(model, Endpoint(host, 0), Machine(), print, attended=False)
