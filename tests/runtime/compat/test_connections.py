"""Many clients that send nothing, or slowly, keep nobody out; with uvicorn's own class they do."""

import asyncio
import http.client
import socket
import threading
from contextlib import ExitStack, contextmanager

import pytest
import uvicorn
from fleet import eventually

from edge_runtime.compat.connections import GivingWay

LIMIT = 128
SLOW = {  # what a client sends, and how many such clients there are
    "nothing": (b"", 3 * LIMIT),
    "half of a head": (b"POST / HTTP/1.1\r\nHost: x\r\nX-", 3 * LIMIT),
    "half of a body": (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{", 3 * LIMIT),
    "a request, and reads nothing": (
        b"POST /long HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n",
        LIMIT + 10,
    ),
}


class Answers:
    """An interface: /long has a long answer, and /due waits until it is told to answer."""

    def __init__(self):
        self.asked, self.due = 0, threading.Event()

    async def __call__(self, scope, receive, send):
        while (await receive()).get("more_body"):
            pass
        if scope["path"] == "/due":
            self.asked += 1
            await asyncio.to_thread(self.due.wait)
        await send({"type": "http.response.start", "status": 200})
        for _ in range(20 if scope["path"] == "/long" else 1):
            await send({"type": "http.response.body", "body": bytes(1 << 16), "more_body": True})
        await send({"type": "http.response.body"})


@contextmanager
def serving(interface, protocol):
    """The port of a server with that class of connections."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)  # of its connections too
        config = uvicorn.Config(
            interface,
            http=protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            limit_concurrency=LIMIT,
            backlog=LIMIT,
            timeout_graceful_shutdown=0,
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            interface.due.set()
            server.should_exit = True
            thread.join()


def asked(port, path="/"):
    """A connection that has sent a request."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", path)
    return connection


def status(connection):
    response = connection.getresponse()
    response.read()
    return response.status


@pytest.mark.parametrize("name", SLOW)
def test_slow_clients_keep_nobody_out(name):
    interface, (sent, clients) = Answers(), SLOW[name]
    with serving(interface, GivingWay) as port, ExitStack() as opened:
        before = asked(port, "/due")
        assert eventually(lambda: interface.asked == 1)
        for number in range(clients):
            slow = opened.enter_context(socket.create_connection(("127.0.0.1", port)))
            slow.sendall(sent)
            if number % 100 == 0:
                assert status(asked(port)) == 200
        assert status(asked(port)) == 200
        # the answer that was due before them
        interface.due.set()
        assert status(before) == 200


def test_uvicorns_own_connections_let_them():
    """The twin of the test above."""
    with serving(Answers(), "h11") as port, ExitStack() as opened:
        for _ in range(LIMIT):
            opened.enter_context(socket.create_connection(("127.0.0.1", port)))
        assert eventually(lambda: status(asked(port)) == 503)


def test_a_client_is_turned_away_while_every_answer_is_due():
    interface = Answers()
    with serving(interface, GivingWay) as port:
        due = [asked(port, "/due") for _ in range(LIMIT)]
        assert eventually(lambda: interface.asked == LIMIT)
        with pytest.raises((OSError, http.client.HTTPException)):
            status(asked(port, "/due"))
        interface.due.set()
        assert {status(connection) for connection in due} == {200}
