"""Presence: one retained message a device and one a fleet's node, with an epoch that grows at every connect.

    online   published after each connect
    offline  published by a clean close
    lost     the will, published by the broker when the connection breaks

The will of an old connection can arrive after "online" of the new connection. So a reader keeps the
highest epoch, and within an epoch accepts only the order online, lost, offline.
"""

import msgspec

from edge_broker import messages, topics
from edge_broker.errors import BadMessage

_ORDER = {"online": 0, "lost": 1, "offline": 2}


class PresenceSpec(msgspec.Struct, frozen=True):
    """Whose presence a session publishes."""

    fleet: str
    id: str  # of a device; empty: the fleet's node
    epoch: int = 0  # the last epoch used, from the caller's state; 0: none
    at_once: bool = True  # after each connect; else when the owner calls `show_online`

    @property
    def topic(self) -> str:
        """Where the presence is published."""
        return topics.presence(self.fleet, self.id) if self.id else topics.node(self.fleet)


class Tracker:
    """The latest presence of every device."""

    def __init__(self) -> None:
        self.devices: dict[str, messages.Presence] = {}

    def handle(self, topic: str, payload: bytes) -> str | None:
        """Take in a message; BadMessage if it is on a presence topic and malformed.

        Returns the device whose state changed; None for another topic, a stale or repeated message.
        """
        try:
            source = topics.parse(topic)
        except BadMessage:
            return None
        if source.kind != "presence":
            return None
        # an empty retained message is how an operator forgets a device
        if not payload:
            return source.device if self.devices.pop(source.device, None) else None
        latest = messages.decode(payload, messages.Presence)
        before = self.devices.get(source.device)
        if before and (latest.epoch, _ORDER[latest.state]) <= (before.epoch, _ORDER[before.state]):
            return None
        self.devices[source.device] = latest
        return source.device

    def state(self, device: str) -> str:
        """online, offline, lost, or unknown where it never connected."""
        presence = self.devices.get(device)
        return presence.state if presence else "unknown"
