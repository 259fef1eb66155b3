"""When the open round may close.

A round does not close while the broker is away, nor in the first second after connecting: presence
messages of that second say who is online. An outage does not count against the deadline.
"""

import time

from edge_broker.session import Connected, Disconnected, Event, Message

OFFLINE_S = 60.0  # wait between two steps of the loop during an outage
GREETING_S = 1.0  # after connecting


class RoundClock:
    """The deadline of the open round, in monotonic time."""

    def __init__(self) -> None:
        self._deadline = self._greeted = 0.0
        self._offline_since: float | None = time.monotonic()  # until the first connection

    def start(self, deadline_s: float) -> None:
        """Set the deadline of a new or an extended round."""
        self._deadline = time.monotonic() + deadline_s

    def handle(self, item: Message | Event | None) -> None:
        """Stop in an outage; afterwards move the deadline by its length, and await presence."""
        now = time.monotonic()
        if isinstance(item, Disconnected):
            self._offline_since = self._offline_since or now
        elif isinstance(item, Connected):
            self._deadline += now - (self._offline_since or now)
            self._offline_since, self._greeted = None, now + GREETING_S

    @property
    def may_close(self) -> bool:
        """Whether the node is online and knows who else is."""
        return self._offline_since is None and time.monotonic() >= self._greeted

    @property
    def late(self) -> bool:
        """Whether the deadline has passed."""
        return time.monotonic() >= self._deadline

    @property
    def due_s(self) -> float:
        """Seconds until `may_close` or `late` changes; negative: it has changed."""
        if self._offline_since is not None:
            return OFFLINE_S
        now = time.monotonic()
        return (self._greeted if now < self._greeted else self._deadline) - now
