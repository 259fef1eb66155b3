"""Why a connection ended is said in words, once, and counted from then on."""

import logging
import socket
import struct
import threading

import pytest
from edge_broker.session import Connected, Disconnected, PresenceSpec, Session

CONNACK = bytes([0x20, 3, 0, 0, 0])


class Broker:
    """Accepts CONNECT, answers each with the next of its scripts' bytes, and closes the connection."""

    def __init__(self, *scripts: bytes, reset: bool = False) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._scripts, self._reset = scripts, reset
        self.url = f"mqtt://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        for script in self._scripts:
            line, _ = self._listener.accept()
            with line:
                head = line.recv(2, socket.MSG_WAITALL)
                line.recv(head[1], socket.MSG_WAITALL)
                line.sendall(script)
                if self._reset:
                    line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                else:
                    line.shutdown(socket.SHUT_WR)
                    while line.recv(1000):  # so that the answer is not lost in a reset
                        pass
        self._listener.close()


def endings(broker: Broker, count: int) -> list[str]:
    """The reasons of the first endings of device `pi`, at a broker that ends every connection."""
    with Session(broker.url, "client", presence=PresenceSpec("f", "pi")) as session:
        session.connect(10)
        seen: list[str] = []
        while len(seen) < count:
            item = session.receive(10)
            assert item is not None
            seen += [item.reason] if isinstance(item, Disconnected) else []
    return seen


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (0x87, "Not authorized; check the certificate or user name, and the access rules"),
        (0x8B, "Server shutting down"),
        (0x8D, "Keep alive timeout; it heard nothing from here for too long"),
        (0x8E, "Session taken over; another client has connected as device `pi`; give each one a name"),
        (0x95, "Packet too large; raise the broker's limit"),
        (0x97, "Quota exceeded; raise the broker's limit for this client"),
    ],
)
def test_the_brokers_reason_is_in_words(code, words):
    (reason,) = endings(Broker(CONNACK + bytes([0xE0, 2, code, 0])), 1)
    assert reason.startswith("the connection to mqtt://127.0.0.1:") and f" ended: {words}" in reason


@pytest.mark.parametrize("reset", [False, True])
def test_a_connection_that_just_ends_is_said_to_have_no_reason(reset):
    assert "ended: the broker closed it without a reason" in endings(Broker(CONNACK, reset=reset), 1)[0]


def test_a_packet_that_mqtt_does_not_have_is_said():
    assert (
        "a packet that MQTT 5 does not have" in endings(Broker(CONNACK + bytes([0x40, 3, 0, 1, 0x42])), 1)[0]
    )


def test_the_same_reason_is_said_the_first_and_the_tenth_time(caplog, monkeypatch):
    monkeypatch.setattr("edge_broker.connection._BACKOFF_S", (0.01, 0.01))
    shutting_down, full = (CONNACK + bytes([0xE0, 2, code, 0]) for code in (0x8B, 0x97))
    with caplog.at_level(logging.WARNING):
        endings(Broker(*[shutting_down] * 11, full), 12)
    told = [record.getMessage() for record in caplog.records if "ended" in record.getMessage()]
    assert ["Server" in line for line in told] == [True, True, False]
    assert "times" not in told[0] and told[1].endswith("(10 times until now); connecting again")


def test_a_connection_that_is_back_is_said_if_its_end_was(caplog, monkeypatch):
    monkeypatch.setattr("edge_broker.connection._BACKOFF_S", (0.01, 0.01))
    with caplog.at_level(logging.WARNING), Session(Broker(*[CONNACK] * 9).url, "client") as session:
        session.connect(10)
        for _ in range(5):
            while not isinstance(session.receive(10), Connected):
                pass
    assert [record.getMessage().startswith("connected to") for record in caplog.records] == [False, True]
