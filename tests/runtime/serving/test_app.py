"""The HTTP interface itself, without a process: its names, and how many prompts are tokenized at once."""

import asyncio
import contextlib
import json
import socket
import threading
import types

import pytest

from edge_runtime.serving.app import Service, app
from edge_runtime.serving.worker import BusyError
from edge_runtime.trainer.tokens import Asked

ENGINE = types.SimpleNamespace(version=1)


async def answer(interface, method, path, body=b"", **headers):
    """Status, headers and body of the interface's answer."""
    sent = []

    async def receive():
        return {"type": "http.request", "body": body}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path, "query_string": b""}
    headers = {"host": "localhost:8080"} | headers
    fields = [(name.encode(), value.encode()) for name, value in headers.items() if value is not None]
    await interface(scope | {"headers": fields}, receive, send)
    return sent[0]["status"], dict(sent[0]["headers"]), sent[1]["body"]


@pytest.fixture
def interface():
    """interface(*origins): the interface of a server at any address."""
    return lambda *origins: app(Service("tiny", ENGINE, None, None, 64, 96), "0.0.0.0", origins)


CHAT = "https://chat.example"
MACHINE = socket.gethostname()
# Host, Origin, and whether a server answers that has CHAT as a further origin
SENDERS = [
    ("localhost", None, True),
    ("LOCALHOST:8080", None, True),
    ("127.0.0.1:8080", None, True),
    ("192.168.1.5", None, True),
    ("[::1]:8080", None, True),
    (f"{MACHINE}:8080", None, True),
    (f"{MACHINE}.local", None, True),
    ("chat.example", None, True),  # through a proxy
    (None, None, True),
    ("localhost:8080", "http://localhost:8080", True),  # a page behind a proxy of this port
    ("localhost:8080", CHAT, True),
    ("chat.example", CHAT, True),
    ("evil.example:8080", None, False),  # DNS rebinding
    ("evil.example:8080", "http://evil.example:8080", False),
    ("evil.localhost", None, False),
    ("localhost.evil.example", None, False),
    ("127.0.0.1.evil.example", None, False),
    ("", None, False),
    ("[", None, False),
    ("localhost:8080", "http://evil.example", False),
    ("localhost:8080", "http://localhost:3000", False),
    ("localhost:8080", "http://localhost", False),
    ("localhost:8080", "null", False),
    ("localhost:8080", "", False),
    ("192.168.1.5", f"{CHAT}.evil", False),
]


@pytest.mark.parametrize(("host", "origin", "answered"), SENDERS)
def test_a_page_of_another_site_is_refused(interface, host, origin, answered):
    served = interface(CHAT)
    for method, path, truth in (("GET", "/health", 200), ("POST", "/v1/completions", 400)):
        status, _, body = asyncio.run(answer(served, method, path, host=host, origin=origin))
        assert status == (truth if answered else 403)
        if not answered:
            error = json.loads(body)["error"]
            assert error["type"] == "invalid_request_error" and "--origin" in error["message"]
            assert MACHINE not in error["message"]
    # the twin: without the check, everybody is answered
    served.user_middleware.clear()
    served.middleware_stack = None
    assert asyncio.run(answer(served, "GET", "/health", host=host, origin=origin))[0] == 200


def test_a_browser_may_read_the_answer_where_an_origin_is_allowed(interface):
    asking = {"origin": CHAT, "access-control-request-method": "POST"}
    asking["access-control-request-headers"] = "authorization,content-type"
    for served, allowed in ((interface(CHAT), True), (interface(), False)):
        status, headers, _ = asyncio.run(answer(served, "OPTIONS", "/v1/chat/completions", **asking))
        assert (status == 200, headers.get(b"access-control-allow-origin")) == (
            allowed,
            CHAT.encode() if allowed else None,
        )


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

    interface = app(Service("tiny", ENGINE, Language(), Busy(), 64, 96), "127.0.0.1")

    async def ask():
        asked = [answer(interface, "POST", "/v1/completions", b'{"prompt": "x"}') for _ in "12"]
        return [status for status, *_ in await asyncio.gather(*asked)]

    assert asyncio.run(ask()) == [429, 429] and not met
