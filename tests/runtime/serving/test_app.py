"""The HTTP interface itself, without a process: its names, and how many prompts are tokenized at once."""

import asyncio
import contextlib
import threading
import types

import pytest

from edge_runtime.serving.app import LOOPBACK, Service, app
from edge_runtime.serving.worker import BusyError
from edge_runtime.trainer.tokens import Asked

ENGINE = types.SimpleNamespace(version=1)


async def status(interface, method, path, host="localhost", body=b""):
    """The status of the interface's answer."""
    sent = []

    async def receive():
        return {"type": "http.request", "body": body}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path, "query_string": b""}
    await interface(scope | {"headers": [(b"host", host.encode())]}, receive, send)
    return sent[0]["status"]


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]"])
def test_a_loopback_address_is_answered_and_another_name_is_not(host):
    interface = app(Service("tiny", ENGINE, None, None, 64, 96), LOOPBACK)
    seen = [
        asyncio.run(status(interface, "GET", "/health", name))
        for name in (host, f"{host}:8080", f"evil.{host}")
    ]
    assert seen == [200, 200, 400]


def test_prompts_are_tokenized_after_each_other():
    """Two prompts that meet in the tokenizer are at work at once."""
    meeting, met = threading.Barrier(2), []

    class Language:
        def prompt(self, text):
            with contextlib.suppress(threading.BrokenBarrierError):
                meeting.wait(0.3)
                met.append(text)
            return Asked([1], "")

    class Busy:
        def submit(self, question, post):
            raise BusyError("full")

    interface = app(Service("tiny", ENGINE, Language(), Busy(), 64, 96), LOOPBACK)

    async def ask():
        asked = [status(interface, "POST", "/v1/completions", body=b'{"prompt": "x"}') for _ in "12"]
        return await asyncio.gather(*asked)

    assert asyncio.run(ask()) == [429, 429] and not met
