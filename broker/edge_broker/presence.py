"""Who is there: a retained message a device, with an epoch that grows at every connect.

    online   published after each connect
    offline  published by a clean close
    lost     the will, published by the broker when the connection breaks

A will of an old connection can land after the birth of the new one, so the reader keeps the highest epoch, and within
one epoch lets a connection only end, never start again.
"""

import time

import msgspec

from edge_broker import messages, topics
from edge_broker.errors import BadMessage

_ORDER = {"online": 0, "lost": 1, "offline": 2}


class PresenceSpec(msgspec.Struct, frozen=True):
    """Whose presence a session keeps. epoch: the last one used, from the caller's state, or 0."""

    fleet: str
    id: str
    epoch: int = 0


def next_epoch(last: int) -> int:
    """The epoch of a new connection: above the last one and, should that be lost, no lower than the clock (ms)."""
    return max(last, time.time_ns() // 1_000_000) + 1


class Tracker:
    """What is known of every device's connection."""

    def __init__(self) -> None:
        self.devices: dict[str, messages.Presence] = {}

    def handle(self, topic: str, payload: bytes) -> str | None:
        """Take in a message from a presence topic.

        Returns:
            The device whose state changed, or None: another topic, or a stale or repeated message.

        Raises:
            BadMessage: it is on a presence topic but malformed.
        """
        try:
            where = topics.parse(topic)
        except BadMessage:
            return None
        if where.kind != "presence":
            return None
        if not payload:  # an empty retained message is how an operator forgets a device
            return where.device if self.devices.pop(where.device, None) else None
        said = messages.decode(payload, messages.Presence)
        known = self.devices.get(where.device)
        if known and (said.epoch, _ORDER[said.state]) <= (known.epoch, _ORDER[known.state]):
            return None
        self.devices[where.device] = said
        return where.device

    def state(self, device: str) -> str:
        """online, offline, lost, or unknown where it never connected."""
        known = self.devices.get(device)
        return known.state if known else "unknown"
