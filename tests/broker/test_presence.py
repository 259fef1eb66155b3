"""Who is there: online, offline after a clean stop, lost after a crash; stale news changes nothing."""

import os
import signal
import time

import pytest
from edge_broker import messages, topics
from edge_broker.errors import BadMessage
from edge_broker.presence import PresenceSpec, Tracker
from edge_broker.session import Connected

HOLD = """
import sys
from edge_broker.session import PresenceSpec, Session
session = Session(sys.argv[1], "holder-" + sys.argv[2], presence=PresenceSpec(sys.argv[2], "d"))
session.connect(60)
print("connected", flush=True)
while True:
    session.receive(60)
"""


@pytest.fixture
def watch(open_session, fleet, await_message):
    """The next state of device d that a tracker reports."""
    session, tracker = open_session("watcher"), Tracker()
    session.subscribe(topics.presence(fleet, topics.ANY))

    def next_state():
        while not tracker.handle(*(lambda m: (m.topic, m.payload))(await_message(session))):
            pass
        return tracker.state("d")

    return next_state


def test_online_then_offline_on_a_clean_stop(open_session, fleet, watch):
    session = open_session("d", presence=PresenceSpec(fleet, "d"))
    assert watch() == "online"
    session.close()
    assert watch() == "offline"


def test_a_stop_right_after_the_start_ends_offline(open_session, fleet, await_message):
    watcher = open_session("watcher")
    for number in range(20):  # the greeting of the connection must not come after the farewell
        name = f"d{number}"
        open_session(name, presence=PresenceSpec(fleet, name)).close()
        watcher.subscribe(topics.presence(fleet, name))
        assert b"offline" in await_message(watcher, f"{name}/presence").payload


def test_lost_when_the_process_is_killed(broker, child, fleet, watch):
    process = child(HOLD, broker.url, fleet)
    assert process.stdout.readline() == "connected\n"
    assert watch() == "online"
    os.kill(process.pid, signal.SIGKILL)
    assert watch() == "lost"


def test_back_online_after_the_line_was_cut_with_a_higher_epoch(open_session, relay, fleet, watch):
    session = open_session("d", url=relay.url, presence=PresenceSpec(fleet, "d"))
    first = session.receive(5)
    assert watch() == "online"
    relay.cut()
    assert watch() == "lost"
    assert watch() == "online"
    events = [session.receive(5) for _ in range(2)]
    assert isinstance(events[1], Connected) and events[1].epoch > first.epoch


def test_an_epoch_from_the_callers_state_is_exceeded_even_if_the_clock_went_back(open_session, fleet):
    ahead = time.time_ns() // 1_000_000 + 3_600_000  # an hour
    session = open_session("d", presence=PresenceSpec(fleet, "d", epoch=ahead))
    assert session.receive(5).epoch > ahead


def said(state, epoch):
    return topics.presence("f", "d"), messages.encode(messages.Presence(state=state, epoch=epoch))


def test_stale_and_repeated_news_changes_nothing():
    tracker = Tracker()
    assert tracker.state("d") == "unknown"
    assert tracker.handle(*said("online", 7)) == "d"
    assert tracker.handle(*said("lost", 6)) is None  # the will of an earlier connection
    assert tracker.handle(*said("online", 7)) is None
    assert tracker.state("d") == "online"
    assert tracker.handle(*said("lost", 7)) == "d"  # the twin: the will of this connection
    assert tracker.handle(*said("online", 7)) is None  # delivered again
    assert tracker.state("d") == "lost"
    assert tracker.handle(*said("online", 8)) == "d"


def test_an_operator_can_forget_a_device():
    tracker = Tracker()
    tracker.handle(*said("online", 7))
    assert tracker.handle(topics.presence("f", "d"), b"") == "d"
    assert tracker.state("d") == "unknown" and tracker.handle(topics.presence("f", "d"), b"") is None


def test_other_topics_are_ignored_and_nonsense_is_refused():
    tracker = Tracker()
    assert tracker.handle(topics.round("f"), b"x") is None and tracker.handle("x", b"x") is None
    with pytest.raises(BadMessage):
        tracker.handle(topics.presence("f", "d"), b'{"state":"happy","epoch":1}')
