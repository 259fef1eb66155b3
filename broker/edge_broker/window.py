"""Unacknowledged publishes: at most 8, within the broker's Receive Maximum and Maximum Packet Size.

paho applies neither limit, and after a reconnect it resends everything it holds. So paho is never
given more than this window. A slot is taken before paho gets the packet, and freed by the broker's
PUBACK, whose reason becomes the ticket's answer. In between, while a thread is in paho's publish, paho
has a packet whose number is not known here. A new connection waits for these numbers before packets
are sorted out.

Some brokers take smaller packets than they announce. Mosquitto with message_size_limit says so in
PUBACK; rumqttd and others close the connection, at each reconnect anew, often before they answer
smaller packets. So of the packets that had no answer when the broker closed three connections in a
row, the largest is given up, and a packet that is too large halves the limit. A packet of at most
LEAST_PACKET is given up only once the limit is as low: else a broker that fell has ended them.
"""

import logging
import threading
from collections.abc import Callable

from paho.mqtt import client as paho
from paho.mqtt.properties import Properties

from edge_broker.errors import Refused
from edge_broker.events import Event, Room, Unsent

SLOTS = 8  # brokers take 10 and more
LEAST_PACKET = 4608  # bytes; the limit is not halved below: offers and reports need as much
_ENDINGS = 3  # connections that a packet may end
_OUTGROWN = "the broker came back with smaller limits"
_RAISE_IT = (
    "raise its limit (message_size_limit or max_packet_size in mosquitto.conf, max_payload_size of rumqttd, "
    "mqtt.max_packet_size of EMQX)"
)

log = logging.getLogger(__name__)


class Ticket:
    """A publish without its PUBACK yet."""

    def __init__(self, topic: str, size: int, waited: bool) -> None:
        self.topic, self.size = topic, size
        self.waited = waited  # a thread waits for the answer; else a refusal becomes an Unsent event
        self.answer: str | None = None  # "": the broker took it; other text: its refusal
        self.endings = 0  # connections that the broker closed before it answered


class Window:
    """The slots of one session; changed guards them and is notified when one comes free."""

    def __init__(self, changed: threading.Condition, put: Callable[[Event], None], packet_max: int) -> None:
        self.slots, self.packet_max = SLOTS, packet_max
        self._learnt_max = packet_max  # what the broker took so far, whatever it announces
        self.used = 0
        self.bytes_up = 0
        self._changed, self._put = changed, put
        self._hungry = False  # a publish_nowait found no slot: tell the owner when there is one
        self._tickets: dict[int, Ticket] = {}
        self._early: dict[int, tuple[str, bool]] = {}  # answers that came during `send`

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

    def send(self, ticket: Ticket, publish: Callable[[], paho.MQTTMessageInfo]) -> None:
        """Give the packet to paho and record its number. Without a connection paho sends it at the next one."""
        info = None
        try:
            info = publish()
        finally:
            with self._changed:
                if info:
                    self.bytes_up += ticket.size if info.rc == paho.MQTT_ERR_SUCCESS else 0
                    self._tickets[info.mid] = ticket
                    if info.mid in self._early:
                        self.settle(info.mid, *self._early.pop(info.mid))
                else:  # paho refused the topic
                    self.used -= 1
                self._changed.notify_all()

    def settle(self, mid: int, answer: str, too_large: bool = False) -> None:
        """Record the broker's answer to a packet; empty for success."""
        with self._changed:
            ticket = self._tickets.pop(mid, None)
            if ticket is None:
                self._early[mid] = (answer, too_large)
                return
            if too_large:
                self._halve(ticket)
                answer = f"{answer}; {_RAISE_IT}"
            ticket.answer = answer
            self.used -= 1
            if answer and not ticket.waited:
                self._put(Unsent(topic=ticket.topic, reason=answer, too_large=ticket.size * too_large))
            if self._hungry:
                self._hungry = False
                self._put(Room())
            self._changed.notify_all()

    def closed(self) -> None:
        """The broker closed the connection, perhaps for a packet that has no answer."""
        with self._changed:
            for ticket in self._tickets.values():
                ticket.endings += 1

    def reconnected(self, slots: int, packet_max: int, client: paho.Client) -> None:
        """Take the limits of a new connection, on which paho resends what is unacknowledged.

        Refused here is what has ended connections or exceeds the limits. paho can only forget all
        packets at once, so the others are published again.
        """
        with self._changed:
            # a slot is taken only while there is a connection, so no further packets come
            self._changed.wait_for(lambda: self.used == len(self._tickets))
            self.slots, self.packet_max = slots, min(packet_max, self._learnt_max)
            suspects = [ticket for ticket in self._tickets.values() if ticket.endings >= _ENDINGS]
            for ticket in suspects:
                ticket.endings = 0
            culprit = max(suspects, key=lambda ticket: ticket.size, default=None)
            if culprit and culprit.size <= LEAST_PACKET < self.packet_max:
                culprit = None
            if culprit:
                self._halve(culprit)
            refusals = {mid: self._refusal(ticket, culprit) for mid, ticket in self._tickets.items()}
        resent = 0
        if len(refusals) > slots or any(refusals.values()):
            for message in client.drop_out_messages():
                refusal = refusals[message.mid]
                if refusal or resent == slots:
                    self.settle(message.mid, refusal or _OUTGROWN, too_large=bool(refusal))
                    continue
                resent += 1
                properties = message.properties
                again = client.publish(message.topic, message.payload, 1, message.retain, properties)
                with self._changed:
                    self._tickets[again.mid] = self._tickets.pop(message.mid)
        with self._changed:
            self.bytes_up += sum(ticket.size for ticket in self._tickets.values())

    def _refusal(self, ticket: Ticket, culprit: Ticket | None) -> str:
        """Why a packet is not sent again, or empty."""
        if ticket is culprit:
            return f"a packet of {ticket.size} bytes ended {_ENDINGS} connections"
        return _OUTGROWN if ticket.size > self.packet_max else ""

    def _halve(self, ticket: Ticket) -> None:
        """The broker has not taken a packet, though its announced limit is no smaller."""
        if LEAST_PACKET < ticket.size <= self.packet_max:
            self._learnt_max = self.packet_max = max(ticket.size // 2, LEAST_PACKET)
            log.warning(
                "the broker does not take a packet of %d bytes, so packets are cut to %d; for larger ones %s",
                *(ticket.size, self.packet_max, _RAISE_IT),
            )


def publish_size(topic: bytes, payload_bytes: int, properties: Properties | None) -> int:
    """Bytes of a whole encoded QoS 1 PUBLISH packet (MQTT 5, section 3.3)."""
    remaining = 2 + len(topic) + 2 + (len(properties.pack()) if properties else 1) + payload_bytes
    length_bytes = next(n for n in (1, 2, 3, 4) if remaining < 128**n)
    return 1 + length_bytes + remaining
