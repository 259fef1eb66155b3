"""The thread that keeps a client of paho connected by running its `loop`.

    closed -> opening -> connected <-> lost, and from each of them -> closing -> closed

paho's own thread is not used: its reconnect has no jitter, and the will's epoch must change before
each connect. The callbacks record events and wake waiting threads. Subscriptions are restored and
presence is published between two calls of `loop`. No lock that a callback takes is held across a
call into paho, because paho holds a lock of its own while it calls back.
"""

import enum
import logging
import random
import socket
import ssl
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any, Literal

from paho.mqtt import client as paho
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from edge_broker import messages
from edge_broker.address import Address
from edge_broker.endings import PACKET_TOO_LARGE, Endings, Errors
from edge_broker.errors import BrokerError, ConnectionClosed, Refused
from edge_broker.events import Connected, Disconnected, Event
from edge_broker.presence import PresenceSpec
from edge_broker.window import SLOTS, Ticket, Window, publish_size

_RECEIVE_MAXIMUM = 32  # messages from the broker without our acknowledgement: 2 MiB of chunks
_PACKET_MAX = 1 << 20  # bytes of the largest PUBLISH sent or accepted
KEEPALIVE_S = 30  # a broker takes a client for lost after one and a half times of it
_SETTLED_S = 10.0  # after a connection that lasted this long the back-off starts anew
_BACKOFF_S = (1.0, 30.0)  # first and largest upper bound of the random wait before a reconnect

log = logging.getLogger(__name__)


class State(enum.Enum):
    """Where a connection is."""

    CLOSED = enum.auto()
    OPENING = enum.auto()  # the first connect, whose failure `open` raises
    CONNECTED = enum.auto()
    LOST = enum.auto()  # the thread tries to connect again
    CLOSING = enum.auto()  # the thread is to end


class Connection:
    """A client of paho, its thread and its state; `changed` guards the state, and is notified."""

    def __init__(
        self,
        address: Address,
        client_id: str,
        spec: PresenceSpec | None,
        expiry_s: int,
        put: Callable[[Event | tuple[int, paho.MQTTMessage]], None],
    ) -> None:
        self.address, self.spec = address, spec
        self.process = uuid.uuid4().hex
        self.changed = threading.Condition(threading.RLock())
        self.state = State.CLOSED
        # number of the latest connect: an acknowledgement must not cross to the next connection
        self.epoch = spec.epoch if spec else 0
        self.window = Window(self.changed, put, _PACKET_MAX)
        self.bytes_down = 0
        self._put, self._expiry_s = put, expiry_s
        self._endings = Endings(address, f"device `{spec.id}`" if spec and spec.id else f"`{client_id}`")
        self._errors = Errors()
        self._failure: BrokerError | None = None  # why the connection broke, or did not come about
        self._greeting: Connected | None = None  # of a connection that the owner has not heard of
        self._forgotten = False  # the broker has lost the session, and the owner has not heard of it
        self._speaking = threading.Lock()  # held while presence is published; never taken in a callback
        self._announce = False  # "online" is still to be published on this connection
        self._leaving = False  # "offline" was published: nothing may follow
        self.filters: dict[str, None] = {}  # of all subscriptions, in the order of subscribing
        # by packet number: answers that a thread waits for; filters that were sent after a reconnect
        self.answers: dict[int, list[ReasonCode]] = {}
        self._restoring: dict[int, tuple[str, ...]] = {}
        self.client = self._make_client(client_id)

    def open(self, timeout_s: float) -> None:
        """Connect, trying once. Raises as `Session.connect` does."""
        if self.state is not State.CLOSED:
            raise BrokerError(f"already connected to {self.address}, or still closing")
        self.client.connect_timeout = timeout_s
        properties = Properties(PacketTypes.CONNECT)
        properties.SessionExpiryInterval = self._expiry_s
        properties.ReceiveMaximum = _RECEIVE_MAXIMUM
        properties.MaximumPacketSize = _PACKET_MAX
        host, port = self.address.host, self.address.port
        # A new process starts clean even where the broker still has its session: rumqttd sends no
        # retained messages to a session that it has. Later connects continue the session, unless it
        # ends with its connection.
        clean = paho.MQTT_CLEAN_START_FIRST_ONLY if self._expiry_s else True
        self.client.connect_async(host, port, KEEPALIVE_S, clean_start=clean, properties=properties)
        self._thread = threading.Thread(target=self._run, name="edge-broker", daemon=True)
        self.state, self._leaving = State.OPENING, False
        self._thread.start()
        with self.changed:
            answered = self.changed.wait_for(lambda: self.state is not State.OPENING, timeout_s)
            if self.state is State.CLOSED and self._failure:
                raise self._failure
        if not answered:
            self.close()
            raise self._endings.unreachable(f"no answer within {timeout_s:g} s")

    def close(self) -> None:
        """Disconnect and end the thread; waiters get a BrokerError."""
        with self.changed:
            if self.state is State.CLOSED:
                return
            self.state = State.CLOSING
            self.changed.notify_all()
        self.client.disconnect()
        self._thread.join(5.0)

    def post(
        self, topic: str, payload: bytes, retain: bool, waited: bool, expiry_s: int | None, limit: int | None
    ) -> Ticket | None:
        """Give a publish to paho if there is a connection and a slot, else return None."""
        properties = None
        if expiry_s is not None:
            properties = Properties(PacketTypes.PUBLISH)
            properties.MessageExpiryInterval = expiry_s
        size = publish_size(topic.encode(), len(payload), properties)
        with self.changed:
            connected = self.state is State.CONNECTED
            ticket = self.window.take(topic, size, limit, waited) if connected else None
        if ticket:
            self.window.send(ticket, lambda: self.client.publish(topic, payload, 1, retain, properties))
        return ticket

    def publish_presence(self, state: Literal["online", "offline"]) -> Ticket | None:
        """Publish the presence if there is room; after "offline" nothing else is published."""
        assert self.spec
        with self._speaking:
            if state == "offline":
                self._leaving = True
            elif self._leaving:
                return None
            body = messages.encode(messages.Presence(state, self.epoch, self.process))
            return self.post(self.spec.topic, body, True, state == "offline", expiry_s=None, limit=None)

    def show_online(self) -> None:
        """Publish "online" once more, at once or when there is room."""
        self._announce = not self.publish_presence("online")

    def send_subscribe(self, filters: tuple[str, ...]) -> int:
        """Send a SUBSCRIBE at QoS 1 and return its packet number; 0 without a connection."""
        _, number = self.client.subscribe([(pattern, SubscribeOptions(qos=1)) for pattern in filters])
        return number or 0

    def check_subscribed(self, filters: tuple[str, ...], codes: list[ReasonCode]) -> None:
        """Raise Refused if the broker's answer to a SUBSCRIBE refuses one of its filters."""
        pairs = zip(filters, codes, strict=False)
        if refused := [f"{pattern} ({code})" for pattern, code in pairs if code.is_failure]:
            raise Refused(
                f"{self.address} refused to subscribe us to {', '.join(refused)}; check its access rules"
            )

    # --- the thread

    def _run(self) -> None:
        failures = 0
        while True:
            began = time.monotonic()
            failure = self._stay_connected()
            with self.changed:
                if self.state not in (State.CONNECTED, State.LOST):
                    break
                self.state = State.LOST
            self._put(Disconnected(reason=str(failure)))
            self._endings.tell(failure)
            if isinstance(failure, ConnectionClosed):
                self.window.closed()
            # full jitter, so that a fleet does not come back in step after the broker's restart
            failures = 0 if time.monotonic() - began > _SETTLED_S else failures + 1
            first, largest = _BACKOFF_S
            wait_s = random.uniform(0, min(largest, first * 2 ** min(max(failures - 1, 0), 10)))
            with self.changed:
                if self.changed.wait_for(lambda: self.state is State.CLOSING, wait_s):
                    break
        self.client.disconnect()  # after a refusal paho's own state would stay at connecting
        with self.changed:
            self.state, self._failure = State.CLOSED, failure
            self.changed.notify_all()

    def _stay_connected(self) -> BrokerError:
        """Connect once, and return why the connection ended or did not come about."""
        self._failure = self._greeting = self._errors.last = None
        # above the last epoch, and above the clock (ms) in case the owner lost the last epoch
        self.epoch = max(self.epoch, time.time_ns() // 1_000_000) + 1
        if self.spec:
            will = messages.encode(messages.Presence("lost", self.epoch, self.process))
            self.client.will_set(self.spec.topic, will, qos=1, retain=True)
        try:
            self.client.reconnect()
            while self.client.loop(timeout=1.0) == paho.MQTT_ERR_SUCCESS:
                self._between_packets()
        except ssl.SSLError as error:
            return self._endings.tls(error)
        # ValueError: a host name that cannot be looked up
        except (OSError, ValueError) as error:
            return self._endings.unreachable(str(error))
        except Exception as error:  # paho's parser: ends the connection, not the session
            log.exception("the connection to %s broke on an unexpected error", self.address)
            return self._endings.unreachable(repr(error))
        return self._failure or self._endings.unreachable("it closed the connection unanswered")

    def _between_packets(self) -> None:
        greeting, self._greeting = self._greeting, None
        # _restoring: the last connection broke before the broker answered
        if greeting and self.filters and (self._restoring or self._forgotten):
            filters = tuple(self.filters)
            self._restoring = {self.send_subscribe(filters): filters}
        if self._announce and self.publish_presence("online"):
            self._announce = False
        # only now: whatever the owner sends upon the greeting comes after subscriptions and presence
        if greeting:
            self._forgotten = False
            self._endings.tell_back()
            self._put(greeting)
        if self.state is State.CLOSING:  # close() may have come while paho was still connecting
            self.client.disconnect()

    # --- paho's callbacks, all called on the thread

    def _make_client(self, client_id: str) -> paho.Client:
        client = paho.Client(
            paho.CallbackAPIVersion.VERSION2, client_id=client_id, protocol=paho.MQTTv5, manual_ack=True
        )
        if tls := self.address.tls():
            client.tls_set_context(tls)
        if self.address.user is not None:
            client.username_pw_set(self.address.user, self.address.password)
        logger = logging.Logger("paho", logging.ERROR)
        logger.addHandler(self._errors)
        client.enable_logger(logger)
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_subscribe = self._on_subscribe
        client.on_publish = self._on_publish
        client.on_message = self._on_message
        # Tells paho that the loop's thread writes. Without it publish() would write at the same time.
        client.on_socket_register_write = lambda *_: None
        return client

    def _on_connect(self, client: paho.Client, _: Any, flags: Any, code: ReasonCode, properties: Any) -> None:
        if code.is_failure:
            self._failure = self._endings.refused(code)
            return
        # chunks and acknowledgements must not wait for each other (Nagle's algorithm)
        line: Any = client.socket()
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        slots = min(SLOTS, getattr(properties, "ReceiveMaximum", SLOTS))
        packet_max = min(_PACKET_MAX, getattr(properties, "MaximumPacketSize", _PACKET_MAX))
        self.window.reconnected(slots, packet_max, client)
        with self.changed:
            if self.state is State.CLOSING:
                return
            self.state = State.CONNECTED
            self._forgotten |= not flags.session_present
            self._greeting = Connected(session_present=not self._forgotten, epoch=self.epoch)
            self._announce = self.spec is not None and self.spec.at_once
            self.answers.clear()  # packet numbers of the last connection mean nothing on this one
            self.changed.notify_all()

    def _on_disconnect(self, _client: Any, _userdata: Any, flags: Any, code: ReasonCode, _: Any) -> None:
        by_broker, stood = flags.is_disconnect_packet_from_server, self.state is State.CONNECTED
        self._failure = self._failure or self._endings.ended(code, by_broker, self._errors.last, stood)

    def _on_subscribe(self, _client: Any, _userdata: Any, mid: int, codes: list[ReasonCode], _: Any) -> None:
        if filters := self._restoring.pop(mid, None):
            try:
                self.check_subscribed(filters, codes)
            except Refused as error:
                log.error("after a reconnect: %s", error)
            return
        with self.changed:
            self.answers[mid] = codes
            self.changed.notify_all()

    def _on_publish(self, _client: Any, _userdata: Any, mid: int, code: ReasonCode, _: Any) -> None:
        answer = f"{self.address} said {code}" if code.is_failure else ""
        self.window.settle(mid, answer, code.value == PACKET_TOO_LARGE)

    def _on_message(self, _client: Any, _userdata: Any, message: paho.MQTTMessage) -> None:
        with self.changed:
            self.bytes_down += publish_size(message._topic, len(message.payload), message.properties)
        self._put((self.epoch, message))
