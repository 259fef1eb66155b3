"""One MQTT 5 session that keeps itself alive.

    connect, subscribe, publish, receive, close

Everything that happens comes out of one queue, in order: messages and events. A message is acknowledged to the broker
when it is taken from the queue, so a slow owner holds the broker back instead of filling its own memory. Every publish
is QoS 1 and answers with the broker's own reason code.
"""

import logging
import queue
import time
from pathlib import Path

from paho.mqtt.client import MQTTMessage

from edge_broker import address, topics
from edge_broker.address import Address
from edge_broker.connection import Connection
from edge_broker.errors import LinkError, Refused
from edge_broker.events import Connected, Disconnected, Event, Message, Own, Room, Traffic, Unsent
from edge_broker.presence import PresenceSpec

__all__ = [
    "Connected",
    "Disconnected",
    "Event",
    "Message",
    "Own",
    "PresenceSpec",
    "Room",
    "Session",
    "Traffic",
    "Unsent",
]

_CHUNK_BYTES = 64 * 1024
_HEADROOM = 512  # bytes of a PUBLISH beside its chunk: the longest topic, and the properties
_OFFLINE_S = 2.0

log = logging.getLogger(__name__)


class Session:
    """A session with a broker that reconnects by itself; use as a context manager or call `close`.

    `receive` belongs to one thread; the rest may be called from any.
    """

    def __init__(
        self,
        url: str | Address,
        client_id: str,
        *,
        presence: PresenceSpec | None = None,
        clean_start: bool = False,
        session_expiry_s: int = 3600,
        ca: Path | None = None,
        cert: Path | None = None,
        key: Path | None = None,
        max_packet_bytes: int = 1 << 20,
    ) -> None:
        """Prepare; nothing is sent before `connect`.

        Args:
            url: mqtt://host:port or mqtts://user:password@host:port?ca=file&cert=file&key=file, or that parsed.
            client_id: fixed for a device; a second session with the same id takes over from the first.
            presence: whose presence to keep, if any.
            clean_start: forget what the broker keeps for this id at every reconnect too (for shared subscriptions,
                with expiry 0), not only when it first connects.
            session_expiry_s: how long the broker keeps subscriptions and messages while the line is broken, if it can
                (rumqttd does not).
            ca, cert, key: PEM files for mqtts; they win over those in the URL.
            max_packet_bytes: the largest PUBLISH sent or accepted.

        Raises:
            LinkError: the URL, the client id or a certificate file cannot be used.
        """
        self._queue: queue.SimpleQueue[Event | tuple[int, MQTTMessage]] = queue.SimpleQueue()
        self._connection = Connection(
            url if isinstance(url, Address) else address.parse(url, ca=ca, cert=cert, key=key),
            topics.name("client id", client_id),
            presence,
            clean_start,
            session_expiry_s,
            max_packet_bytes,
            self._queue.put,
        )

    def connect(self, timeout_s: float) -> None:
        """Connect, trying once; from then on the session reconnects by itself, with full-jitter back-off.

        Raises:
            BrokerUnreachable: nobody answered there in time, or the broker is too busy.
            Refused: the broker refused us, or we its certificate.
        """
        self._connection.open(timeout_s)

    def close(self) -> None:
        """Say offline, disconnect, stop; safe to call twice."""
        connection = self._connection
        if connection.connected and connection.spec:
            try:
                self._publish(lambda: connection.say("offline", waited=True), "say offline", _OFFLINE_S)
            except LinkError as error:
                log.warning("%s", error)
        connection.stop()

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def subscribe(self, *filters: str, timeout_s: float = 10.0) -> None:
        """Subscribe and wait for the broker's word; done again after a reconnect on which the broker had lost the
        session.

        Raises:
            Refused: the broker refused a filter; none of this call is remembered then.
            LinkError: no answer in time.
        """
        self._connection.subscribe(filters, time.monotonic() + timeout_s)
        self._connection.filters.update(dict.fromkeys(filters))

    def unsubscribe(self, *filters: str) -> None:
        """Stop receiving these, without waiting; messages on their way may still come."""
        for one in filters:
            self._connection.filters.pop(one, None)
        self._connection.client.unsubscribe(list(filters))

    def publish(
        self,
        topic: str,
        payload: bytes,
        *,
        retain: bool = False,
        expiry_s: int | None = None,
        timeout_s: float = 30.0,
    ) -> None:
        """Publish and wait until the broker has taken it; waits for a connection and for room in the window first.

        The broker's word means neither that it is on disk nor that anyone received it.

        Raises:
            Refused: the broker refused it, or the packet is larger than it takes.
            BrokerUnreachable: there was no connection in time.
            LinkError: no room or no answer in time; the message may still arrive.
        """
        self._publish(
            lambda: self._connection.post(topic, payload, retain, expiry_s, None, waited=True),
            f"publish to {topic}",
            timeout_s,
        )

    def publish_nowait(
        self,
        topic: str,
        payload: bytes,
        *,
        retain: bool = False,
        expiry_s: int | None = None,
        window: int | None = None,
    ) -> bool:
        """Publish if the window has room, and return at once.

        At most 8 publishes are unacknowledged at once, and never more than the broker's Receive Maximum or this call's
        window.

        Returns:
            False if there is no room or no connection; a Room or a Connected event says when to try again. A refusal by
            the broker comes as an Unsent event.

        Raises:
            Refused: the packet is larger than the broker takes.
        """
        return self._connection.post(topic, payload, retain, expiry_s, window, waited=False) is not None

    def receive(self, timeout_s: float) -> Message | Event | None:
        """The next message or event, or None after timeout_s (0: only what is already there)."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                item = self._queue.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                return None
            if not isinstance(item, tuple):
                return item
            generation, raw = item
            if generation == self._connection.generation:
                self._connection.client.ack(raw.mid, raw.qos)
            try:
                return Message(topic=raw.topic, payload=bytes(raw.payload), retained=raw.retain)
            except UnicodeDecodeError:
                log.warning("dropped a message whose topic is not UTF-8")

    def put(self, item: object) -> None:
        """Hand something of the owner's to whoever receives next, from any thread; it comes out as Own."""
        self._queue.put(Own(item))

    @property
    def connected(self) -> bool:
        """Whether there is a connection right now."""
        return self._connection.connected

    @property
    def chunk_bytes(self) -> int:
        """The largest chunk to cut: 64 KiB, or what the broker's Maximum Packet Size leaves."""
        return max(1, min(_CHUNK_BYTES, self._connection.window.packet_max - _HEADROOM))

    @property
    def traffic(self) -> Traffic:
        """Bytes of all PUBLISH packets in each direction, resent ones included."""
        connection = self._connection
        with connection.changed:
            return Traffic(bytes_up=connection.window.bytes_up, bytes_down=connection.bytes_down)

    def _publish(self, post, what: str, timeout_s: float) -> None:  # type: ignore[no-untyped-def]
        connection, window = self._connection, self._connection.window
        deadline = time.monotonic() + timeout_s
        ticket = None
        while ticket is None:
            connection.wait_connected(deadline, what)
            if not connection.wait(lambda: connection.connected and window.used < window.slots, deadline):
                raise LinkError(
                    f"cannot {what}: no room within {timeout_s:g} s, {window.used} publishes unanswered"
                )
            ticket = post()
        if not connection.wait(lambda: ticket.answer is not None, deadline):
            raise LinkError(f"cannot {what}: no answer within {timeout_s:g} s; it may still arrive")
        if ticket.answer:
            raise Refused(f"cannot {what}: {ticket.answer}")
