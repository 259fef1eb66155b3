"""One MQTT 5 session that keeps itself alive.

    connect, subscribe, publish, receive, close

Messages and events come out of one queue, in order. A message is acknowledged to the broker when it
is taken from the queue, so a slow owner slows the broker down instead of filling the memory. Every
publish is QoS 1 and ends with the broker's reason code.
"""

import logging
import queue
import time
from collections.abc import Callable

from paho.mqtt.client import MQTTMessage

from edge_broker import address, topics
from edge_broker.address import Address
from edge_broker.connection import Connection, State
from edge_broker.errors import BrokerError, BrokerUnreachable, Refused
from edge_broker.events import Connected, Disconnected, Event, Message, Own, Room, Traffic, Unsent
from edge_broker.presence import PresenceSpec
from edge_broker.window import Ticket

__all__ = ["Connected", "Disconnected", "Event", "Message", "Own", "PresenceSpec", "Room", "Session"]
__all__ += ["Traffic", "Unsent"]

_CHUNK_BYTES = 64 * 1024
_HEADROOM = 512  # bytes of a PUBLISH beside its chunk: the longest topic, and the properties
_SUBSCRIBE_S, _PUBLISH_S, _OFFLINE_S = 10.0, 30.0, 2.0  # until the broker's answer

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
        session_expiry_s: int = 3600,
    ) -> None:
        """Prepare; nothing is sent before `connect`.

        Args:
            url: as `address` describes, or parsed.
            client_id: fixed for a device; a second session with this id takes over from the first.
            presence: whose presence to publish, if any.
            session_expiry_s: how long the broker keeps subscriptions and messages without a
                connection, if it can (rumqttd cannot). 0: the session ends with its connection, as
                shared subscriptions need.

        Raises:
            BrokerError: the URL, the client id or a certificate file cannot be used.
        """
        self._queue: queue.SimpleQueue[Event | tuple[int, MQTTMessage]] = queue.SimpleQueue()
        self._connection = Connection(
            url if isinstance(url, Address) else address.parse(url),
            topics.name("client id", client_id),
            presence,
            session_expiry_s,
            self._queue.put,
        )

    def connect(self, timeout_s: float) -> None:
        """Connect, trying once; from then on the session reconnects by itself.

        Raises:
            BrokerUnreachable: no broker answered in time, or the broker is too busy.
            Refused: the broker refused this client, or its certificate is not trusted.
        """
        self._connection.open(timeout_s)

    def close(self) -> None:
        """Publish "offline", disconnect and end the thread; safe to call twice."""
        connection = self._connection
        if self.connected and connection.spec:
            try:
                self._publish(lambda: connection.publish_presence("offline"), "say offline", _OFFLINE_S)
            except BrokerError as error:
                log.warning("%s", error)
        connection.close()

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def subscribe(self, *filters: str) -> None:
        """Subscribe and wait for the broker's answer; sent again to a broker that lost the session.

        Raises:
            Refused: the broker refused a filter; then none of these filters is kept.
            BrokerUnreachable: there was no connection in time.
            BrokerError: no answer in time.
        """
        connection, purpose = self._connection, f"subscribe to {', '.join(filters)}"
        deadline = time.monotonic() + _SUBSCRIBE_S
        codes = None
        while codes is None:
            epoch = self._wait_connected(deadline, purpose)
            number = connection.send_subscribe(filters)

            # a SUBSCRIBE goes down with its connection
            def over(number: int = number, epoch: int = epoch) -> bool:
                return number in connection.answers or connection.epoch != epoch

            if not self._wait(over, deadline):
                raise BrokerError(f"cannot {purpose}: {connection.address} did not answer in time")
            codes = connection.answers.pop(number, None)
        connection.check_subscribed(filters, codes)
        connection.filters.update(dict.fromkeys(filters))

    def unsubscribe(self, *filters: str) -> None:
        """Stop receiving these topics, without waiting; messages on their way may still arrive."""
        for pattern in filters:
            self._connection.filters.pop(pattern, None)
        self._connection.client.unsubscribe(list(filters))

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Wait for a connection and a slot, publish, and wait for the broker's acknowledgement.

        An acknowledged message is neither on the broker's disk yet nor received by anyone.

        Raises:
            Refused: the broker refused the message, or the packet is larger than the broker takes.
            BrokerUnreachable: there was no connection in time.
            BrokerError: no slot or no answer in time; the message may still arrive.
        """
        self._publish(
            lambda: self._connection.post(topic, payload, retain, waited=True, expiry_s=None, limit=None),
            f"publish to {topic}",
            _PUBLISH_S,
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

        At most 8 publishes are unacknowledged at once, and never more than the broker's Receive
        Maximum or this call's window.

        Returns:
            False without a free slot or a connection; a Room or Connected event follows when a new
            try makes sense. If the broker refuses the message, an Unsent event follows.

        Raises:
            Refused: the packet is larger than the broker takes.
        """
        ticket = self._connection.post(topic, payload, retain, waited=False, expiry_s=expiry_s, limit=window)
        return ticket is not None

    def receive(self, timeout_s: float) -> Message | Event | None:
        """The next message or event, or None after timeout_s (0: do not wait)."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                item = self._queue.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                return None
            if not isinstance(item, tuple):
                return item
            # an acknowledgement belongs to the connection that the message came by
            epoch, raw = item
            if epoch == self._connection.epoch:
                self._connection.client.ack(raw.mid, raw.qos)
            try:
                return Message(raw.topic, bytes(raw.payload), raw.retain)
            except UnicodeDecodeError:
                log.warning("dropped a message whose topic is not UTF-8")

    def put(self, item: object) -> None:
        """Put an item into the queue, from any thread; `receive` returns it as Own."""
        self._queue.put(Own(item))

    def show_online(self) -> None:
        """Publish the presence once more, as a sign of life for those who ask for one."""
        self._connection.show_online()

    @property
    def process(self) -> str:
        """The random name of this session in its presence; a restarted process has another one."""
        return self._connection.process

    @property
    def connected(self) -> bool:
        """Whether there is a connection right now."""
        return self._connection.state is State.CONNECTED

    @property
    def packet_max(self) -> int:
        """Bytes of the largest PUBLISH that the broker takes, as announced or as found out."""
        return self._connection.window.packet_max

    @property
    def chunk_bytes(self) -> int:
        """The largest chunk to cut: 64 KiB, or what `packet_max` leaves."""
        return max(1, min(_CHUNK_BYTES, self.packet_max - _HEADROOM))

    @property
    def traffic(self) -> Traffic:
        """Bytes of all PUBLISH packets in each direction, resent ones included."""
        connection = self._connection
        with connection.changed:
            return Traffic(bytes_up=connection.window.bytes_up, bytes_down=connection.bytes_down)

    def _publish(self, post: Callable[[], Ticket | None], purpose: str, timeout_s: float) -> None:
        window, deadline = self._connection.window, time.monotonic() + timeout_s
        # other threads may take the slot between the wait and the post
        ticket = None
        while ticket is None:
            self._wait_connected(deadline, purpose)
            if not self._wait(lambda: self.connected and window.used < window.slots, deadline):
                unanswered = f"{window.used} publishes unanswered"
                raise BrokerError(f"cannot {purpose}: no room within {timeout_s:g} s, {unanswered}")
            ticket = post()
        if not self._wait(lambda: ticket.answer is not None, deadline):
            raise BrokerError(f"cannot {purpose}: no answer within {timeout_s:g} s; it may still arrive")
        if ticket.answer:
            raise Refused(f"cannot {purpose}: {ticket.answer}")

    def _wait_connected(self, deadline: float, purpose: str) -> int:
        """Wait for a connection and return its epoch."""
        if not self._wait(lambda: self.connected, deadline):
            raise BrokerUnreachable(f"cannot {purpose}: no connection to {self._connection.address}")
        return self._connection.epoch

    def _wait(self, condition: Callable[[], bool], deadline: float) -> bool:
        """Wait until the condition holds; False when the deadline (monotonic) passed."""
        connection, closed = self._connection, (State.CLOSED, State.CLOSING)
        left_s = max(0.0, deadline - time.monotonic())
        with connection.changed:
            connection.changed.wait_for(lambda: condition() or connection.state in closed, left_s)
            if connection.state in closed:
                raise BrokerError(f"the session with {connection.address} is closed; call connect first")
            return condition()
