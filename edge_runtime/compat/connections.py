"""A server's connections give way to newer ones while they wait for their clients.

Libraries   uvicorn >= 0.34; tried with 0.54
Reason      uvicorn waits without end for a request, and refuses everybody's requests while it has
            limit_concurrency connections: clients that send nothing, or slowly, keep others out
Change      none; a subclass of uvicorn's protocol for h11 has another use of limit_concurrency
Breaks      when uvicorn gives `connections`, `cycle` or `flow` another name: a connection beyond
            the limit then fails with an AttributeError
Test        tests/runtime/compat/test_connections.py
"""

import asyncio
from itertools import count
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

_TURNS = count()


class GivingWay(H11Protocol):
    """A connection. Beyond the limit, the one that has waited longest for its client is closed.

    No clock decides: while there is room, a client may take any time. A connection whose answer is
    due stays, and where all are due the newest is closed.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._limit, self.limit_concurrency = self.limit_concurrency, None
        self._turn = next(_TURNS)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Count the connection, and make room for it."""
        super().connection_made(transport)
        # in two rounds of the loop: what has come with the connection is read by then
        self.loop.call_soon(self.loop.call_soon, self._make_room)

    def on_response_complete(self) -> None:
        """Wait for the client's next request from now on."""
        self._turn = next(_TURNS)
        super().on_response_complete()

    def _make_room(self) -> None:
        connections: set[Any] = self.connections
        if self._limit is not None and len(connections) > self._limit:
            waiting = (each for each in connections if each._waits())
            closed = min(waiting, key=lambda each: each._turn, default=self)
            connections.discard(closed)
            closed.transport.abort()

    def _waits(self) -> bool:
        """Whether the client has to go on: to send its request, or to read its answer."""
        cycle: Any = self.cycle
        return cycle is None or cycle.response_complete or cycle.more_body or self.flow.write_paused
