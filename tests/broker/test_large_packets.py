"""Brokers that take smaller packets than they announce: Mosquitto answers with a code, rumqttd closes the connection."""

import logging
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from edge_broker import local, window
from edge_broker.events import Unsent
from edge_broker.local import Broker, find_mosquitto, start_broker
from edge_broker.transfer import Committed, Fetched, Fetcher, Rejected

PAYLOAD = random.Random(5).randbytes(150_000)


@pytest.fixture
def broker(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    impatient: None,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Broker]:
    """A broker whose limit is no part of what it announces."""
    kind, limit = request.param
    if kind == "mosquitto" and not find_mosquitto():
        pytest.skip("Mosquitto is not installed")
    monkeypatch.setattr(
        local,
        "_MOSQUITTO",
        local._MOSQUITTO.replace("max_packet_size 1048576", f"message_size_limit {limit}"),
    )
    monkeypatch.setattr(
        local, "_RUMQTTD", local._RUMQTTD.replace("max_payload_size = 1048576", f"max_payload_size = {limit}")
    )
    monkeypatch.setattr("edge_broker.connection._BACKOFF_S", (0.05, 0.1))
    with start_broker(state_dir=tmp_path_factory.mktemp(kind), kind=kind) as running:
        yield running


def limited(limit: int) -> pytest.MarkDecorator:
    """Both brokers, with this limit in bytes."""
    return pytest.mark.parametrize(
        "broker", [("mosquitto", limit), ("embedded", limit)], ids=["mosquitto", "embedded"], indirect=True
    )


def unsent(session, timeout_s=60.0):
    """The next refusal."""
    deadline = time.monotonic() + timeout_s
    while (left_s := deadline - time.monotonic()) > 0:
        if isinstance(item := session.receive(left_s), Unsent):
            return item
    raise AssertionError(f"no refusal within {timeout_s} s")


@limited(20_000)
def test_an_update_is_cut_until_the_broker_takes_it(broker, device, node, drive, caplog):
    d, n = device(), node()
    first = d.add(PAYLOAD)
    with caplog.at_level(logging.WARNING):
        drive(lambda: d.results, d, n)
    (result,) = d.results
    assert isinstance(result, Committed) and result.manifest.chunk_bytes < 20_000 < first.chunk_bytes
    assert [update.payload.read_bytes() for update in n.journal.committed(1)] == [PAYLOAD]
    told = [record.getMessage() for record in caplog.records if "packets are cut" in record.getMessage()]
    assert len(told) == 2 and all("message_size_limit" in line for line in told)
    assert d.session.chunk_bytes == result.manifest.chunk_bytes  # the next update is cut so at once


@limited(20_000)
def test_a_version_is_served_again_in_chunks_that_the_broker_takes(
    broker, open_session, fleet, node, drive, tmp_path
):
    class Reader:
        def __init__(self):
            self.session = open_session("r")
            self.fetcher, self.result = Fetcher(self.session, fleet, "r", tmp_path / "r"), None

        def turn(self):
            self.result = self.fetcher.handle(self.session.receive(0.0003)) or self.result
            self.fetcher.tick()

    (tmp_path / "version").write_bytes(PAYLOAD)
    n, r = node(), Reader()
    sizes = []
    while not r.result:  # as the node's announcements do it
        artifact = n.publisher.serve(tmp_path / "version")
        sizes.append(artifact.chunk_bytes)
        r.fetcher.fetch(artifact)
        drive(lambda: r.result or n.publisher.outgrown, r, n)
    assert isinstance(r.result, Fetched) and r.result.path.read_bytes() == PAYLOAD
    assert len(sizes) == 3 and sizes[-1] < 20_000


@limited(3_000)
def test_an_update_that_no_cut_makes_small_enough_is_given_up(broker, device, node, drive):
    d, n = device(), node()
    d.add(PAYLOAD)
    drive(lambda: d.results, d, n)
    (result,) = d.results
    assert isinstance(result, Rejected) and (result.code, result.final) == ("limit", True)
    assert "message_size_limit" in result.reason and d.outbox.pending() == []


@limited(20_000)
def test_packets_beside_the_one_that_is_too_large_arrive_once_it_is_given_up(
    broker, open_session, fleet, await_message
):
    session, reader = open_session("d"), open_session("reader")
    reader.subscribe(f"{fleet}/#")
    for size in (10, 30_000, 20):
        while not session.publish_nowait(f"{fleet}/{size}", bytes(size)):  # the connection has ended already
            assert session.receive(20) is not None
    refusal = unsent(session)
    reason = "said Packet too large" if broker.kind == "mosquitto" else "bytes ended 3 connections"
    assert refusal.topic == f"{fleet}/30000" and reason in refusal.reason
    assert len(await_message(reader, "/20").payload) == 20
    session.publish(f"{fleet}/last", b"x")
    assert session._connection.window.used == 0


@pytest.mark.parametrize("broker", [("embedded", 20_000)], indirect=True)
def test_without_a_bound_the_packet_ends_one_connection_after_another(
    broker, open_session, fleet, monkeypatch
):
    monkeypatch.setattr(window, "_ENDINGS", 6)  # the twin of the count above
    session = open_session("d")
    assert session.publish_nowait(f"{fleet}/30000", bytes(30_000))
    assert "ended 6 connections" in unsent(session).reason


class Sender:
    """Has paho's side of packets that no broker answers, the first of this size."""

    def __init__(self, size, changed=None):
        self.told = []
        changed = changed or threading.Condition(threading.RLock())
        self._window = window.Window(changed, self.told.append, 1 << 20)
        self._messages, self._number = [], 0
        self.post("up", size)

    def post(self, topic, size, meanwhile=lambda: None):
        def publish():
            message = self.publish(topic, b"", 1, False, None)
            meanwhile()
            return message

        self._window.send(self._window.take(topic, size, None, False), publish)

    def publish(self, topic, payload, qos, retain, properties):
        self._number += 1
        self._messages.append(
            SimpleNamespace(
                mid=self._number, topic=topic, payload=payload, retain=retain, properties=properties, rc=0
            )
        )
        return self._messages[-1]

    def drop_out_messages(self):
        dropped, self._messages = self._messages, []
        return dropped

    def end(self, times, packet_max=1 << 20):
        for _ in range(times):
            self._window.closed()
            self._window.reconnected(8, packet_max, self)
        return [item.topic for item in self.told if isinstance(item, Unsent)]


def test_a_small_packet_is_not_given_up_for_a_broker_that_falls():
    small, large, narrow = Sender(4096), Sender(30_000), Sender(4096)
    assert small.end(times=7) == [] and small._window.used == 1
    assert large.end(times=2) == [] and large.end(times=1) == ["up"]
    assert narrow.end(times=3, packet_max=window.LEAST_PACKET) == ["up"]  # a limit that no cut satisfies


class Patience(threading.Condition):
    """Shows that a thread waits for a change; one without patience does not wait."""

    def __init__(self, patient):
        super().__init__(threading.RLock())
        self.waits, self._patient = threading.Event(), patient

    def wait_for(self, predicate, timeout=None):
        self.waits.set()
        return super().wait_for(predicate if self._patient else lambda: True, timeout)


@pytest.mark.parametrize(
    "patient", [True, False]
)  # False: the twin, in which the new connection does not wait
def test_a_packet_in_another_threads_hands_goes_to_the_new_connection(patient):
    sender = Sender(30_000, changed := Patience(patient))
    with ThreadPoolExecutor(1) as loop:

        def reconnect():  # paho has the packet, and the window has not heard of its number
            connection.append(loop.submit(sender._window.reconnected, 8, 20_000, sender))
            assert changed.waits.wait(20) and (patient or connection[0].exception(20))

        connection = []
        sender.post("report", 100, meanwhile=reconnect)
        if not patient:
            assert isinstance(connection[0].exception(20), KeyError)
            return
        connection[0].result(20)
    assert [item.topic for item in sender.told] == ["up"]  # alone larger than the new limit
    assert [message.topic for message in sender.drop_out_messages()] == ["report"]
    assert sender._window.used == 1
