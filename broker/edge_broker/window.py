"""Unacknowledged publishes: at most 8, within the broker's Receive Maximum and Maximum Packet Size.

paho applies neither limit, and after a reconnect it resends everything it holds. So paho is never
given more than this window. A slot is taken before paho gets the packet, and freed by the broker's
PUBACK, whose reason becomes the ticket's answer.
"""

import threading
from collections.abc import Callable, Iterable

from paho.mqtt import client as paho
from paho.mqtt.properties import Properties

from edge_broker.errors import Refused
from edge_broker.events import Event, Room, Unsent

SLOTS = 8  # brokers take 10 and more


class Ticket:
    """A publish without its PUBACK yet."""

    def __init__(self, topic: str, size: int, waited: bool) -> None:
        self.topic, self.size = topic, size
        self.waited = waited  # a thread waits for the answer; else a refusal becomes an Unsent event
        self.answer: str | None = None  # "": the broker took it; other text: its refusal


class Window:
    """The slots of one session; changed guards them and is notified when one comes free."""

    def __init__(self, changed: threading.Condition, put: Callable[[Event], None], packet_max: int) -> None:
        self.slots, self.packet_max = SLOTS, packet_max
        self.used = 0
        self.bytes_up = 0
        self._changed, self._put = changed, put
        self._hungry = False  # a publish_nowait found no slot: tell the owner when there is one
        self._tickets: dict[int, Ticket] = {}
        self._early: dict[int, str] = {}  # answers that overtook `sent`

    def take(self, topic: str, size: int, limit: int | None, waited: bool) -> Ticket | None:
        """Take a slot for a packet of size bytes; None if limit (or all) slots are in use.

        Raises Refused where the packet is larger than the broker takes.
        """
        with self._changed:
            if size > self.packet_max:
                limits = f"is {size} bytes encoded, the broker takes {self.packet_max}"
                raise Refused(f"a publish to {topic} {limits}; cut it smaller")
            if self.used >= min(self.slots, limit or self.slots):
                self._hungry |= not waited
                return None
            self.used += 1
            return Ticket(topic, size, waited)

    def sent(self, mid: int, ticket: Ticket, on_the_wire: bool) -> None:
        """Record paho's number of the packet; off the wire: to be sent after a reconnect."""
        with self._changed:
            self.bytes_up += ticket.size if on_the_wire else 0
            self._tickets[mid] = ticket
            if mid in self._early:
                self.settle(mid, self._early.pop(mid))

    def settle(self, mid: int, answer: str) -> None:
        """Record the broker's answer to a packet; empty for success."""
        with self._changed:
            ticket = self._tickets.pop(mid, None)
            if ticket is None:
                self._early[mid] = answer
                return
            ticket.answer = answer
            self.used -= 1
            if answer and not ticket.waited:
                self._put(Unsent(topic=ticket.topic, reason=answer))
            if self._hungry:
                self._hungry = False
                self._put(Room())
            self._changed.notify_all()

    def reconnected(
        self, slots: int, packet_max: int, drop: Callable[[], Iterable[paho.MQTTMessage]]
    ) -> None:
        """Take the limits of a new connection, on which paho resends what is unacknowledged.

        Where the resent publishes would exceed the limits, `drop` makes paho forget them.
        """
        with self._changed:
            self.slots, self.packet_max = slots, packet_max
            tickets = self._tickets.values()
            outgrown = self.used > slots or any(ticket.size > packet_max for ticket in tickets)
        for message in drop() if outgrown else ():
            self.settle(message.mid, "the broker came back with smaller limits")
        with self._changed:
            self.bytes_up += sum(ticket.size for ticket in self._tickets.values())


def publish_size(topic: bytes, payload_bytes: int, properties: Properties | None) -> int:
    """Bytes of a whole encoded QoS 1 PUBLISH packet (MQTT 5, section 3.3)."""
    remaining = 2 + len(topic) + 2 + (len(properties.pack()) if properties else 1) + payload_bytes
    length_bytes = next(n for n in (1, 2, 3, 4) if remaining < 128**n)
    return 1 + length_bytes + remaining
