"""The thread that keeps one MQTT connection alive by running paho's `loop`.

paho's own thread is not used: its reconnect has no jitter, and the will's epoch must change before
each connect. The callbacks only record what happened and wake waiting threads. Subscriptions are
restored and presence is published between two calls of `loop`. No lock that a callback takes is held
across a call into paho, because paho holds a lock of its own while it calls back.
"""

import logging
import random
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from paho.mqtt import client as paho
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from edge_broker import errors, messages, presence, topics
from edge_broker.address import Address
from edge_broker.errors import BrokerError, BrokerUnreachable
from edge_broker.events import Connected, Disconnected, Event
from edge_broker.subscriptions import Subscriptions
from edge_broker.window import SLOTS, Ticket, Window, publish_size

_RECEIVE_MAXIMUM = 32  # messages from the broker without our acknowledgement: 2 MiB of chunks
_PACKET_MAX = 1 << 20  # bytes of the largest PUBLISH sent or accepted
_KEEPALIVE_S = 30
_SETTLED_S = 10.0  # after a connection that lasted this long the back-off starts anew
_BACKOFF_S = (1.0, 30.0)  # first and largest upper bound of the random wait before a reconnect

log = logging.getLogger(__name__)


class Connection:
    """A client of paho, its thread and its state; `changed` guards the state and tells of changes."""

    def __init__(
        self,
        address: Address,
        client_id: str,
        spec: presence.PresenceSpec | None,
        expiry_s: int,
        put: Callable[[Event | tuple[int, paho.MQTTMessage]], None],
    ) -> None:
        self.address, self.spec = address, spec
        self.epoch = spec.epoch if spec else 0
        self.changed = threading.Condition(threading.RLock())
        self.window = Window(self.changed, put, _PACKET_MAX)
        self.connected = False
        # counts connections: an acknowledgement must not cross to the next one
        self.generation = 0
        self.bytes_down = 0
        self._put, self._expiry_s = put, expiry_s
        self._opened_at = 0  # the generation before open()
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._failure: BrokerError | None = None
        self._greet: bool | None = None  # session_present of a connection not greeted yet
        self._announce = False  # "online" is still to be published on this connection
        self._leaving = False  # "offline" was published: nothing may follow
        # held while presence is published; never taken in a callback
        self._speaking = threading.Lock()
        self.client = self._make_client(client_id)
        self.subscriptions = Subscriptions(self.client, address, self.changed)

    def open(self, timeout_s: float) -> None:
        """Connect, trying once.

        Raises:
            BrokerUnreachable, Refused: see `Session.connect`.
        """
        if self._thread and self._thread.is_alive():
            raise BrokerError(f"already connected to {self.address}, or still closing")
        self._stopping.clear()
        self._leaving = False
        self._failure = None
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
        self.client.connect_async(host, port, _KEEPALIVE_S, clean_start=clean, properties=properties)
        before = self._opened_at = self.generation
        self._thread = threading.Thread(target=self._run, name="edge-broker", daemon=True)
        self._thread.start()
        with self.changed:
            self.changed.wait_for(lambda: self.generation > before or self._failure, timeout_s)
            if self.generation > before:
                return
            failure = self._failure
        self.stop()
        raise failure or errors.unreachable(self.address, f"no answer within {timeout_s:g} s")

    def stop(self) -> None:
        """Disconnect and end the thread; waiters get a BrokerError."""
        self._stopping.set()
        with self.changed:
            self.changed.notify_all()
        self.client.disconnect()
        if self._thread:
            self._thread.join(5.0)
        self.connected = False

    def wait(self, condition: Callable[[], bool], deadline: float) -> bool:
        """Wait until the condition holds; False when the deadline (monotonic) passed.

        Raises:
            BrokerError: the connection was closed for good meanwhile.
        """
        left_s = max(0.0, deadline - time.monotonic())
        with self.changed:
            self.changed.wait_for(lambda: condition() or self._stopping.is_set(), left_s)
            if self._stopping.is_set():
                raise BrokerError(f"the session with {self.address} is closed")
            return condition()

    def wait_connected(self, deadline: float, purpose: str) -> int:
        """Wait for a connection and return its generation.

        Raises:
            BrokerUnreachable: there was no connection in time.
        """
        if not self._thread:
            raise BrokerError(f"cannot {purpose}: call connect first")
        if not self.wait(lambda: self.connected, deadline):
            raise BrokerUnreachable(f"cannot {purpose}: no connection to {self.address}")
        return self.generation

    def post(
        self, topic: str, payload: bytes, retain: bool, expiry_s: int | None, limit: int | None, waited: bool
    ) -> Ticket | None:
        """Give a publish to paho if there is a connection and a slot, else return None.

        Raises:
            Refused: the packet is larger than the broker takes.
            BrokerError: paho refused it.
        """
        properties = None
        if expiry_s is not None:
            properties = Properties(PacketTypes.PUBLISH)
            properties.MessageExpiryInterval = expiry_s
        size = publish_size(topic.encode(), len(payload), properties)
        ticket = self.window.take(topic, size, limit, waited) if self.connected else None
        if ticket:
            info = self.client.publish(topic, payload, qos=1, retain=retain, properties=properties)
            if info.rc not in (paho.MQTT_ERR_SUCCESS, paho.MQTT_ERR_NO_CONN):
                self.window.give_back()
                raise BrokerError(f"cannot publish to {topic}: {paho.error_string(info.rc)}")
            self.window.sent(info.mid, ticket, on_the_wire=info.rc == paho.MQTT_ERR_SUCCESS)
        return ticket

    def subscribe(self, filters: tuple[str, ...], deadline: float) -> None:
        """Subscribe at QoS 1 and wait for the broker's answer, across reconnects.

        Raises:
            Refused, BrokerError: see `Session.subscribe`.
        """
        purpose = f"subscribe to {', '.join(filters)}"
        while True:
            generation = self.wait_connected(deadline, purpose)
            if (number := self.subscriptions.send(filters)) is None:
                continue  # the connection broke meanwhile

            def settled(number: int = number, generation: int = generation) -> bool:
                return self.subscriptions.answered(number) or self.generation != generation

            if not self.wait(settled, deadline):
                raise BrokerError(f"cannot {purpose}: {self.address} did not answer in time")
            if self.subscriptions.remember(filters, number):
                return

    def publish_presence(self, state: Any, waited: bool) -> Ticket | None:
        """Publish the presence if there is room; after "offline" nothing else is published."""
        assert self.spec
        with self._speaking:
            self._leaving |= state == "offline"
            if self._leaving and state != "offline":
                return None
            body = messages.encode(messages.Presence(state=state, epoch=self.epoch))
            return self.post(topics.presence(self.spec.fleet, self.spec.id), body, True, None, None, waited)

    # --- the thread

    def _run(self) -> None:
        failures = 0
        while not self._stopping.is_set():
            began = time.monotonic()
            self._renew_will()
            try:
                self.client.reconnect()
                while self.client.loop(timeout=1.0) == paho.MQTT_ERR_SUCCESS:
                    self._between_packets()
            # ValueError: a certificate for another host
            except (OSError, ValueError) as error:
                self._broken(errors.failed_connection(self.address, error))
            except Exception as error:  # paho's parser: ends the connection, not the session
                log.exception("the connection to %s broke on an unexpected error", self.address)
                self._broken(errors.unreachable(self.address, repr(error)))
            # the first connect failed: open() raises the reason
            if self.generation == self._opened_at:
                with self.changed:
                    unanswered = errors.unreachable(self.address, "it closed the connection unanswered")
                    self._failure = self._failure or unanswered
                    self.changed.notify_all()
                return
            # full jitter, so that a fleet does not come back in step after the broker's restart
            failures = 0 if time.monotonic() - began > _SETTLED_S else failures + 1
            first, largest = _BACKOFF_S
            self._stopping.wait(random.uniform(0, min(largest, first * 2 ** min(max(failures - 1, 0), 10))))

    def _renew_will(self) -> None:
        if self.spec:
            self.epoch = presence.next_epoch(self.epoch)
            will = messages.encode(messages.Presence(state="lost", epoch=self.epoch))
            self.client.will_set(topics.presence(self.spec.fleet, self.spec.id), will, qos=1, retain=True)

    def _between_packets(self) -> None:
        # the owner hears of the connection only after its subscriptions were sent again
        if self._greet is not None:
            session_present, self._greet = self._greet, None
            if not session_present:
                self.subscriptions.restore()
            self._put(Connected(session_present=session_present, epoch=self.epoch))
        if self._announce and self.publish_presence("online", waited=False):
            self._announce = False
        if self._stopping.is_set():  # stop() may have come while paho was still connecting
            self.client.disconnect()

    def _broken(self, error: BrokerError) -> None:
        with self.changed:
            self.connected = False
            self._failure = self._failure or error
            reason = str(self._failure)
            opened = self.generation > self._opened_at
            if opened:  # otherwise open() raises the failure
                self._failure = None
            self.changed.notify_all()
        if opened and not self._stopping.is_set():
            self._put(Disconnected(reason=reason))

    # --- paho's callbacks, all called on the thread

    def _make_client(self, client_id: str) -> paho.Client:
        client = paho.Client(
            paho.CallbackAPIVersion.VERSION2, client_id=client_id, protocol=paho.MQTTv5, manual_ack=True
        )
        if tls := self.address.tls():
            client.tls_set_context(tls)
        if self.address.user is not None:
            client.username_pw_set(self.address.user, self.address.password)
        client.on_socket_open = self._on_socket_open
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_publish = self._on_publish
        client.on_message = self._on_message
        # Tells paho that the loop's thread writes. Without it publish() would write at the same time.
        client.on_socket_register_write = lambda *_: None
        return client

    def _on_socket_open(self, _client: Any, _userdata: Any, sock: Any) -> None:
        # chunks and acknowledgements must not wait for each other (Nagle's algorithm)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _on_connect(self, client: paho.Client, _: Any, flags: Any, code: ReasonCode, properties: Any) -> None:
        if code.is_failure:
            self._failure = errors.refused_connection(self.address, code.value, str(code))
            return
        slots = min(SLOTS, getattr(properties, "ReceiveMaximum", SLOTS))
        packet_max = min(_PACKET_MAX, getattr(properties, "MaximumPacketSize", _PACKET_MAX))
        if self.window.outgrows(slots, packet_max):  # resending would break this connection too
            for message in client.drop_out_messages():
                self.window.settle(message.mid, "the broker came back with smaller limits")
        with self.changed:
            self.generation += 1
            self.connected = True
            self._greet = bool(flags.session_present)
            self._announce = self.spec is not None
            self.subscriptions.connected()
            self.window.reconnected(slots, packet_max)
            self.changed.notify_all()

    def _on_disconnect(self, _client: Any, _userdata: Any, _flags: Any, code: ReasonCode, _: Any) -> None:
        self._broken(errors.unreachable(self.address, f"the connection broke ({code})"))

    def _on_publish(self, _client: Any, _userdata: Any, mid: int, code: ReasonCode, _: Any) -> None:
        self.window.settle(mid, f"{self.address} said {code}" if code.is_failure else "")

    def _on_message(self, _client: Any, _userdata: Any, message: paho.MQTTMessage) -> None:
        with self.changed:
            self.bytes_down += publish_size(message._topic, len(message.payload), message.properties)
        self._put((self.generation, message))
