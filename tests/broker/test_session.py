"""One session on a real broker: connecting, publishing within limits, surviving a cut line."""

import socket
import subprocess
import threading
import time

import pytest
from edge_broker import topics, window
from edge_broker.errors import BrokerError, BrokerUnreachable, Refused
from edge_broker.local import find_mosquitto, start_broker
from edge_broker.session import (
    Connected,
    Disconnected,
    Message,
    Own,
    PresenceSpec,
    Room,
    Session,
    Traffic,
    Unsent,
)


def next_event(session, kind, timeout_s=60.0):
    deadline = time.monotonic() + timeout_s
    while (left := deadline - time.monotonic()) > 0:
        found = session.receive(left)
        if isinstance(found, kind):
            return found
    raise AssertionError(f"no {kind.__name__} within {timeout_s} s")


def until(condition, timeout_s=60.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not reached within {timeout_s} s"


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


# --- connecting


def test_no_broker_is_said_with_the_address_and_what_to_do():
    port = free_port()
    with pytest.raises(BrokerUnreachable) as error:
        Session(f"mqtt://me:secret@127.0.0.1:{port}", "a").connect(60)
    assert str(error.value) == (
        f"no MQTT broker answered at mqtt://me:***@127.0.0.1:{port}: [Errno 111] Connection refused; "
        "start one with `edge-runtime broker` or check the address"
    )


def test_a_server_that_says_nothing_is_given_up_in_time():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        with pytest.raises(BrokerUnreachable, match=r"no answer within 0\.3 s"):
            Session(f"mqtt://127.0.0.1:{silent.getsockname()[1]}", "a").connect(0.3)
    assert time.monotonic() - began < 3


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("localhost:1883", "mqtt://host:port"),
        ("http://a", "mqtt://host:port"),
        ("mqtt://a:99999", "not a URL"),
        ("mqtt://a?ca=x", "need mqtts"),
        ("mqtts://a?user=x", "only ca, cert and key"),
        ("mqtts://a?ca=/nowhere", "cannot set up TLS"),
    ],
)
def test_an_address_that_cannot_be_used(url, message):
    with pytest.raises(BrokerError, match=message):
        Session(url, "a")


def test_plain_text_where_tls_is_needed_is_said(broker):
    with pytest.raises(
        BrokerError, match=rf"TLS with mqtts://127.0.0.1:{broker.url.rsplit(':')[-1]}|no MQTT broker"
    ):
        Session(broker.url.replace("mqtt:", "mqtts:"), "a").connect(60)


# --- talking


def test_what_is_published_arrives(open_session, fleet, await_message):
    a, b = open_session("a"), open_session("b")
    assert isinstance(a.receive(1), Connected)
    b.subscribe(f"{fleet}/x/#")
    a.publish(f"{fleet}/x/1", b"hello")
    assert await_message(b) == Message(topic=f"{fleet}/x/1", payload=b"hello")


def test_retained_is_what_was_there_before(open_session, fleet, await_message):
    a, b = open_session("a"), open_session("b")
    assert a.publish_nowait(f"{fleet}/x", b"kept", retain=True, expiry_s=60)
    a.publish(f"{fleet}/y", b"acknowledged after it")
    b.subscribe(f"{fleet}/x")
    assert await_message(b).payload == b"kept"


def test_receive_returns_none_in_time(open_session):
    session = open_session()
    session.receive(1)
    began = time.monotonic()
    assert session.receive(0.05) is None and session.receive(0) is None
    assert 0.04 < time.monotonic() - began < 0.5


def test_the_owner_can_put_something_of_its_own_on_the_queue(open_session):
    session = open_session()
    next_event(session, Connected)
    threading.Thread(target=session.put, args=("trained",)).start()
    assert session.receive(5) == Own("trained")


def test_a_closed_session_says_so(open_session):
    session = open_session()
    session.close()
    session.close()
    with pytest.raises(BrokerError, match="is closed"):
        session.publish("x", b"")
    assert not session.publish_nowait("x", b"")


def test_a_second_connect_that_fails_says_why(broker, tmp_path):
    with start_broker(state_dir=tmp_path, kind=broker.kind) as other:
        session = Session(other.url, "a")
        session.connect(60)
        session.close()
    with pytest.raises(BrokerUnreachable, match="Connection refused"):
        session.connect(60)


def test_a_session_can_connect_again(open_session, fleet, await_message):
    session = open_session()
    session.close()
    session.connect(60)
    session.subscribe(f"{fleet}/x")
    session.publish(f"{fleet}/x", b"again")
    assert await_message(session).payload == b"again"


# --- limits


def flood(session, topic, count, size=100):
    """Publish without waiting as the window allows, driven by Room events."""
    sent = 0
    while sent < count:
        if session.publish_nowait(topic, bytes(size)):
            sent += 1
        else:
            next_event(session, Room)


@pytest.mark.parametrize("slots", [8, pytest.param(20, id="twin: a wider window is seen")])
def test_at_most_eight_publishes_are_unanswered(slots, open_session, relay, fleet, monkeypatch):
    monkeypatch.setattr(window, "SLOTS", slots)
    monkeypatch.setattr("edge_broker.connection.SLOTS", slots)
    session = open_session(url=relay.url)
    relay.let_acks_pass.clear()
    sent = 0
    while session.publish_nowait(f"{fleet}/x", b"x"):
        sent += 1
    until(lambda: relay.outstanding == sent)
    relay.let_acks_pass.set()
    flood(session, f"{fleet}/x", 100)
    session.publish(f"{fleet}/x", b"last")
    assert sent == relay.outstanding_max == slots


def test_a_call_can_ask_for_a_narrower_window(open_session, relay, fleet):
    session = open_session(url=relay.url)
    relay.let_acks_pass.clear()
    assert [session.publish_nowait(f"{fleet}/x", b"x", window=2) for _ in range(3)] == [True, True, False]
    relay.let_acks_pass.set()
    next_event(session, Room)
    assert session.publish_nowait(f"{fleet}/x", b"x", window=2)


@pytest.fixture
def narrow_mosquitto(tmp_path):
    """A Mosquitto that announces Receive Maximum 3 and Maximum Packet Size 2,000, with rules that refuse one topic."""
    if not find_mosquitto():
        pytest.skip("Mosquitto is not installed")
    port = free_port()
    (tmp_path / "acl").write_text("topic write ok/#\ntopic read ok/#\n")
    (tmp_path / "conf").write_text(
        f"listener {port} 127.0.0.1\nallow_anonymous true\nmax_inflight_messages 3\nmax_packet_size 2000\n"
        f"acl_file {tmp_path}/acl\nuser root\n"
    )
    process = subprocess.Popen([find_mosquitto(), "-c", tmp_path / "conf"], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 5
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            break
        except OSError:
            assert time.monotonic() < deadline
    yield f"mqtt://127.0.0.1:{port}"
    process.kill()
    process.wait(5)


def test_the_brokers_own_limits_hold(narrow_mosquitto):
    with Session(narrow_mosquitto, "a") as session:
        session.connect(60)
        assert session._connection.window.slots == 3
        assert session.chunk_bytes == 2000 - 512
        room = (
            2000 - window.publish_size(b"ok/x", 0, None) - 1
        )  # the length of a larger packet takes a byte more
        session.publish("ok/x", bytes(room))
        with pytest.raises(Refused, match="is 2001 bytes encoded, the broker takes 2000"):
            session.publish("ok/x", bytes(room + 1))


def test_what_the_broker_refuses_is_raised(narrow_mosquitto):
    with Session(narrow_mosquitto, "a") as session:
        session.connect(60)
        with pytest.raises(Refused, match=r"cannot publish to forbidden: .*Not authorized"):
            session.publish("forbidden", b"x")
        assert session.publish_nowait("forbidden", b"x")
        assert "Not authorized" in next_event(session, Unsent).reason


# --- a line that breaks


def test_it_comes_back_and_subscriptions_with_it(open_session, relay, fleet, await_message):
    session = open_session(url=relay.url, session_expiry_s=0)  # the broker forgets: the session must not
    session.subscribe(f"{fleet}/x")
    next_event(session, Connected)
    relay.cut()
    reason = next_event(session, Disconnected).reason
    assert reason.startswith("the connection to mqtt://127.0.0.1:") and "closed it without a reason" in reason
    assert not next_event(session, Connected).session_present
    session.publish(f"{fleet}/x", b"after")
    assert await_message(session).payload == b"after"


def test_a_session_kept_by_the_broker_gets_what_came_meanwhile(
    broker, open_session, relay, fleet, await_message
):
    if broker.kind == "embedded":
        pytest.skip("rumqttd keeps no session that began with a clean start, whatever its expiry")
    away, other = open_session(url=relay.url), open_session()
    away.subscribe(f"{fleet}/x")
    next_event(away, Connected)
    relay.cut()
    next_event(away, Disconnected)
    other.publish(f"{fleet}/x", b"meanwhile")
    assert await_message(away).payload == b"meanwhile"


def test_subscriptions_that_were_sent_again_without_an_answer_are_sent_once_more(impatient):
    subscribed = []

    def serve(session_present, answers):
        line, _ = server.accept()
        with line:
            _packet(line)  # CONNECT
            line.sendall(bytes([0x20, 3, session_present, 0, 0]))
            packet = _packet(line)
            subscribed.append(packet[4:])
            if answers:
                line.sendall(bytes([0x90, 4, *packet[2:4], 0, 1]))
            else:
                line.shutdown(socket.SHUT_RDWR)
            broken.wait(60 if answers else 0)

    broken = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server, Session(_url(server), "a") as session:
        # the second broker has forgotten the session, and ends before it reads SUBSCRIBE; the third goes on with it
        script = [(0, True), (0, False), (1, True)]
        first = threading.Thread(target=serve, args=script[0], daemon=True)
        first.start()
        session.connect(60)
        session.subscribe("x")
        broken.set()
        first.join(60)
        for step in script[1:]:
            serve(*step)
    assert len(subscribed) == 3 and subscribed[0] == subscribed[1] == subscribed[2]


def _url(server):
    return f"mqtt://127.0.0.1:{server.getsockname()[1]}"


def _packet(line):
    """One MQTT packet of less than 128 bytes."""
    head = line.recv(2, socket.MSG_WAITALL)
    return head + line.recv(head[1], socket.MSG_WAITALL)


def test_a_device_started_again_is_told_what_is_retained(broker, open_session, fleet, await_message):
    open_session().publish(f"{fleet}/x", b"kept", retain=True)
    for _ in range(2):  # the second time the broker still has the session
        with Session(broker.url, f"{fleet}-d") as device:
            device.connect(60)
            device.subscribe(f"{fleet}/x")
            assert await_message(device).payload == b"kept"


def test_a_publish_that_was_cut_off_is_sent_again(open_session, relay, fleet, await_message):
    session, reader = open_session(url=relay.url), open_session()
    reader.subscribe(f"{fleet}/x")
    relay.let_acks_pass.clear()
    for number in range(8):
        assert session.publish_nowait(f"{fleet}/x", bytes([number]))
    relay.cut()
    relay.let_acks_pass.set()
    seen = set()
    while len(seen) < 8:
        seen.add(await_message(reader).payload)
    session.publish(f"{fleet}/x", b"last")  # all slots are free again
    assert session._connection.window.used == 0


# --- traffic


def test_traffic_is_what_passed_on_the_wire(open_session, relay, fleet, await_message):
    session, other = open_session(url=relay.url), open_session()
    session.subscribe(f"{fleet}/down/#")
    for size in (0, 1, 100, 127, 128, 16_000, 17_000, 70_000):
        expiry_s = 60 if size % 2 else None
        topic = f"{fleet}/up/{'n' * (size % 7)}"
        assert session.publish_nowait(topic, bytes(size), expiry_s=expiry_s, retain=size == 1)
        assert other.publish_nowait(f"{fleet}/down/{size}", bytes(size), expiry_s=expiry_s)
        assert len(await_message(session).payload) == size
        session.publish(f"{fleet}/up/x", b"")  # acknowledged after the one before it
    before = Traffic(bytes_up=relay.bytes("up"), bytes_down=relay.bytes("down"))
    assert session.traffic == before
    session.publish(f"{fleet}/up/x", b"more")
    assert session.traffic != before  # the twin: a byte more is seen


def test_presence_and_resent_packets_count_as_traffic(open_session, relay, fleet):
    session = open_session(url=relay.url, presence=PresenceSpec(fleet, "d"))
    relay.let_acks_pass.clear()
    assert session.publish_nowait(topics.report(fleet, "d"), bytes(1000))
    until(lambda: relay.bytes("up") == session.traffic.bytes_up > 1000)
    relay.cut()
    relay.let_acks_pass.set()
    next_event(session, Disconnected)
    next_event(session, Connected)
    session.publish(topics.report(fleet, "d"), b"last")
    assert session.traffic.bytes_up == relay.bytes("up") > 2000  # sent twice, counted twice


def test_a_packet_that_paho_refuses_leaves_its_slot(open_session, fleet):
    session = open_session("d")
    for _ in range(window.SLOTS + 1):
        with pytest.raises(ValueError, match="wildcard"):
            session.publish_nowait(f"{fleet}/+", b"x")
    session.publish(f"{fleet}/last", b"x")
