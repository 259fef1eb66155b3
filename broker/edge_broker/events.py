"""Messages and events, as they come out of a session's queue."""

import msgspec


class Message(msgspec.Struct, frozen=True):
    """A message from the broker."""

    topic: str
    payload: bytes
    retained: bool = False  # sent before we subscribed, and kept by the broker


class Connected(msgspec.Struct, frozen=True):
    """The connection stands."""

    session_present: bool  # the broker still had the subscriptions and messages
    epoch: int  # of this connection; the next process's PresenceSpec needs it


class Disconnected(msgspec.Struct, frozen=True):
    """The connection broke, or an attempt to restore it failed; the session goes on trying."""

    reason: str


class Room(msgspec.Struct, frozen=True):
    """`publish_nowait` returned False before, and has room again."""


class Unsent(msgspec.Struct, frozen=True):
    """The broker refused a `publish_nowait`."""

    topic: str
    reason: str
    too_large: int = 0  # bytes of the packet, if the broker does not take so many; else 0


class Own(msgspec.Struct, frozen=True):
    """An item that the session's owner put on the queue, so that one wait covers everything."""

    item: object


Event = Connected | Disconnected | Room | Unsent | Own


class Traffic(msgspec.Struct, frozen=True):
    """Encoded PUBLISH packets since the session was made, in bytes; the counters only grow."""

    bytes_up: int
    bytes_down: int
