"""Parties to drive beside real brokers: a device, a node, and a relay that sees every packet and can hold or cut it off."""

import contextlib
import itertools
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import edge_broker
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from edge_broker import messages, signing, store
from edge_broker.events import Message
from edge_broker.journal import Journal, Update
from edge_broker.local import Broker
from edge_broker.outbox import Outbox
from edge_broker.session import Session
from edge_broker.transfer import Publisher, Receiver, Uploader

_numbers = itertools.count()
PUBLISH, PUBACK = 3, 4


@pytest.fixture
def fleet() -> str:
    """A fleet of its own for each test, as they share a broker."""
    return f"fleet-{os.getpid()}-{next(_numbers)}"


@pytest.fixture
def open_session(broker: Broker) -> Iterator[Callable[..., Session]]:
    sessions = []

    def connected(name: str = "client", url: str | None = None, **options: object) -> Session:
        session = Session(url or broker.url, f"{name}-{next(_numbers)}", **options)
        sessions.append(session)
        session.connect(60)
        return session

    yield connected
    for session in sessions:
        session.close()


class Device:
    """One device with its outbox; what the uploader returned is in results."""

    def __init__(self, session: Session, fleet: str, name: str, folder: Path, key: Ed25519PrivateKey) -> None:
        self.session, self.fleet, self.name, self.key = session, fleet, name, key
        self.folder = folder / name
        self.outbox = Outbox(store.connect(folder / f"{name}.sqlite"), self.folder)
        self.uploader = Uploader(session, self.outbox, fleet, name, key)
        self.uploader.start()
        self.results: list = []

    def add(self, payload: bytes, round: int = 1, chunk_bytes: int = 65536) -> messages.Manifest:
        described = manifest(payload, self.fleet, self.name, round, chunk_bytes)
        self.folder.mkdir(exist_ok=True)
        file = self.folder / described.transfer
        file.write_bytes(payload)
        return self.outbox.add(described, file)

    def turn(self) -> None:
        if result := self.uploader.handle(self.session.receive(0.0003)):
            self.results.append(result)
        self.uploader.tick()


class Node:
    """A node that commits what is complete, unless told to hold.

    chunks counts all that came, duplicates too; published the chunks of artifacts that went out.
    """

    def __init__(
        self, session: Session, fleet: str, folder: Path, keys: dict, check: Callable = lambda _: None
    ) -> None:
        self.session = session
        self.published, publish = 0, session.publish_nowait

        def counting(topic: str, payload: bytes, **options: object) -> bool:
            taken = publish(topic, payload, **options)
            self.published += taken and "/artifact/" in topic
            return taken

        session.publish_nowait = counting
        self.journal = Journal(store.connect(folder / "node.sqlite"), folder / "node")
        self.receiver = Receiver(session, self.journal, fleet, "n", check, keys.get)
        self.receiver.start()
        self.publisher = Publisher(session, fleet)
        self.publisher.start()
        self.complete: list[Update] = []
        self.chunks, self.hold = 0, False

    def turn(self) -> None:
        message = self.session.receive(0.0003)
        self.chunks += isinstance(message, Message) and "/up/" in message.topic
        if done := self.receiver.handle(message):
            self.complete.append(done)
            if not self.hold:
                self.receiver.commit(done.manifest.transfer)
        self.publisher.handle(message)
        self.receiver.tick()
        self.publisher.tick()


@pytest.fixture
def keys() -> dict[str, str]:
    """Public keys of the enrolled devices, by name; `device` fills it."""
    return {}


@pytest.fixture
def device(
    open_session: Callable[..., Session], fleet: str, tmp_path: Path, keys: dict
) -> Callable[..., Device]:
    def make(name: str = "d", session: Session | None = None, enrol: bool = True) -> Device:
        key = signing.load_or_create_key(tmp_path / f"{name}.key")
        if enrol:
            keys[name] = signing.public_key(key)
        return Device(session or open_session(name), fleet, name, tmp_path, key)

    return make


@pytest.fixture
def node(open_session: Callable[..., Session], fleet: str, tmp_path: Path, keys: dict) -> Callable[..., Node]:
    def make(check: Callable = lambda _: None, session: Session | None = None) -> Node:
        session = session or open_session("node", session_expiry_s=0)
        return Node(session, fleet, tmp_path, keys, check)

    return make


def manifest(
    payload: bytes | Path, fleet: str, name: str = "d", round: int = 1, chunk_bytes: int = 65536
) -> messages.Manifest:
    origin = messages.Origin(
        fleet=fleet, device=name, round=round, model_class="m@1", codec="raw", samples=10
    )
    if isinstance(payload, Path):
        return messages.describe(payload, origin, chunk_bytes)
    with tempfile.NamedTemporaryFile() as file:
        file.write(payload)
        file.flush()
        return messages.describe(Path(file.name), origin, chunk_bytes)


@pytest.fixture
def describe() -> Callable[..., messages.Manifest]:
    return manifest


@pytest.fixture
def drive() -> Callable[..., None]:
    """Run parties in turn until a condition holds; fail after a bound."""

    def run(until: Callable[[], object], *parties: object, timeout_s: float = 120.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not until():
            assert time.monotonic() < deadline, f"not reached within {timeout_s} s"
            for party in parties:
                party.turn()

    return run


@pytest.fixture
def await_message() -> Callable[..., Message]:
    """The next message that a session receives on a topic ending so."""

    def wait(session: Session, ending: str = "", timeout_s: float = 60.0) -> Message:
        deadline = time.monotonic() + timeout_s
        while (left := deadline - time.monotonic()) > 0:
            found = session.receive(left)
            if isinstance(found, Message) and found.topic.endswith(ending):
                return found
        raise AssertionError(f"no message on …{ending} within {timeout_s} s")

    return wait


@pytest.fixture
def child(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Start Python code in its own process; its stdout can be read line by line."""
    started = []

    def start(code: str, *arguments: object) -> subprocess.Popen:
        path = os.pathsep.join([str(Path(edge_broker.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": path},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait(5)
        process.stdout.close()


class Relay:
    """Stands between one client and the broker, reads every MQTT packet by its own parser, and can hold back PUBACKs or
    cut the line.

    packets: (direction, type, bytes of the whole packet), direction up or down; outstanding_max: most PUBLISHes without
    PUBACK, going up.
    """

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"mqtt://127.0.0.1:{self._listener.getsockname()[1]}"
        self.packets: list[tuple[str, int, int]] = []
        self.outstanding = self.outstanding_max = 0
        self.let_acks_pass = threading.Event()
        self.let_acks_pass.set()
        self._lines: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def bytes(self, direction: str) -> int:
        return sum(size for way, kind, size in list(self.packets) if way == direction and kind == PUBLISH)

    def cut(self) -> None:
        for line in self._lines:
            shut(line)
        self._lines.clear()
        self.outstanding = 0

    def close(self) -> None:
        self.let_acks_pass.set()
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._broker.port))
            for line in (client, server):
                line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._lines += [client, server]
            threading.Thread(target=self._pump, args=(client, server, "up"), daemon=True).start()
            threading.Thread(target=self._pump, args=(server, client, "down"), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, direction: str) -> None:
        try:
            while packet := _read_packet(source):
                kind = packet[0] >> 4
                if kind == PUBLISH and direction == "up":
                    self.outstanding += 1
                    self.outstanding_max = max(self.outstanding_max, self.outstanding)
                if kind == PUBACK and direction == "down":
                    self.let_acks_pass.wait(10)
                    self.outstanding -= 1
                self.packets.append((direction, kind, len(packet)))
                target.sendall(packet)
        except OSError:
            pass
        finally:
            shut(source)
            shut(target)


def _read_packet(source: socket.socket) -> bytes:
    """One MQTT packet: a byte, a length of 1-4 bytes with 7 bits each, and that many bytes."""
    head = bytearray(_read(source, 1))
    length, shift = 0, 0
    while head:
        byte = _read(source, 1)[0]
        head.append(byte)
        length |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return bytes(head) + _read(source, length)
    return b""


def _read(source: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = source.recv(size - len(data))
        if not piece:
            return b""
        data += piece
    return bytes(data)


def shut(line: socket.socket) -> None:
    with contextlib.suppress(OSError):
        line.shutdown(socket.SHUT_RDWR)
    line.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reconnect and ask again in tenths of a second instead of seconds."""
    monkeypatch.setattr("edge_broker.connection._BACKOFF_S", (0.2, 1.0))
    monkeypatch.setattr("edge_broker.transfer.upload.retry_s", lambda tries: 0.3)


@pytest.fixture
def relay(broker: Broker, impatient: None) -> Iterator[Relay]:
    running = Relay(broker)
    yield running
    running.close()
