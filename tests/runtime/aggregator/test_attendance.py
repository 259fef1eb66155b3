"""Who is there, for a node: heard by itself, or within the time that MQTT leaves a silent client."""

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from edge_broker import messages, topics
from edge_broker.local import Broker
from edge_broker.session import Message, PresenceSpec, Session

from edge_runtime.aggregator import attendance
from edge_runtime.aggregator.attendance import Attendance

_numbers = itertools.count()


class Watch:
    """A node's session and attendance, and devices that connect to the same broker."""

    def __init__(self, broker: Broker, sessions: ExitStack) -> None:
        self._url, self._sessions, self.fleet = broker.url, sessions, f"attendance-{next(_numbers)}"
        self.news: list[str] = []
        self.outsider = self.connect("outsider")

    def start(self) -> None:
        self.session = self.connect("node")
        self.attendance = Attendance(self.session, self.fleet)
        self.session.subscribe(topics.presence(self.fleet, topics.ANY), topics.report(self.fleet, topics.ANY))

    def connect(self, name: str, presence: str | None = None) -> Session:
        spec = PresenceSpec(self.fleet, presence) if presence else None
        session = Session(self._url, f"{self.fleet}-{name}", presence=spec, session_expiry_s=0)
        session.connect(30)
        self._sessions.callback(session.close)
        return session

    def say(self, device: str, state: str, epoch: int, process: str = "p") -> None:
        """Publish a presence for a device that is not connected."""
        body = messages.encode(messages.Presence(state, epoch, process))
        self.outsider.publish(topics.presence(self.fleet, device), body, retain=True)

    def until(self, holds: Callable[[], bool], timeout_s: float = 20.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not holds():
            assert time.monotonic() < deadline, f"not reached; news: {self.news}"
            self.news += self.attendance.handle(self.session.receive(min(0.05, self.attendance.due_s)))

    def settle(self) -> None:
        """Take in all that was published before this call."""
        self.outsider.publish(topics.report(self.fleet, name := f"last{next(_numbers)}"), b"x")
        self.until(lambda: name in self.attendance._heard)


@pytest.fixture
def watch(broker: Broker) -> Iterator[Watch]:
    with ExitStack() as sessions:
        yield Watch(broker, sessions)


def test_a_device_whose_online_the_broker_has_kept_is_there_until_its_answer_is_due(
    watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attendance, "ANSWER_S", 0.5)
    watch.say("ghost", "online", 7)
    watch.start()
    watch.until(lambda: watch.attendance.present == {"ghost"})
    watch.until(lambda: not watch.attendance.present)
    watch.until(lambda: any("ghost is online for the broker, but" in text for text in watch.news))
    watch.settle()
    assert watch.attendance.known == {"ghost"}
    assert sum("has not answered" in text for text in watch.news) == 1


def test_a_device_that_answers_is_there_however_late(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attendance, "ANSWER_S", 0.3)
    early, late = watch.connect("e", presence="early"), watch.connect("l", presence="late")
    watch.outsider.publish(f"{watch.fleet}/x", b"after their presence")
    watch.start()
    early.show_online()
    watch.until(lambda: watch.attendance.present == {"early"})
    late.show_online()
    watch.until(lambda: watch.attendance.present == {"early", "late"})
    late.close()
    watch.until(lambda: watch.attendance.present == {"early"})


def test_any_message_of_a_device_is_a_sign_of_life_but_one_that_the_broker_kept(
    watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attendance, "ANSWER_S", 0.3)
    for name in ("kept", "fresh"):
        watch.say(name, "online", 7)
    watch.outsider.publish(topics.report(watch.fleet, "kept"), b"x", retain=True)
    watch.start()
    watch.until(lambda: watch.attendance.present == {"kept", "fresh"})
    watch.outsider.publish(topics.report(watch.fleet, "fresh"), b"x")
    watch.until(lambda: watch.attendance.present == {"fresh"})


def test_a_node_that_connects_again_asks_again(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attendance, "ANSWER_S", 0.3)
    watch.start()
    watch.say("d", "online", 7)
    watch.until(lambda: watch.attendance.present == {"d"})
    watch.session.close()
    watch.session.connect(30)
    watch.session.subscribe(topics.presence(watch.fleet, topics.ANY))
    watch.until(lambda: not watch.attendance.present)


def test_a_forgotten_device_is_unknown(watch: Watch) -> None:
    watch.start()
    watch.say("d", "online", 7)
    watch.until(lambda: watch.attendance.known == {"d"})
    watch.outsider.publish(topics.presence(watch.fleet, "d"), b"", retain=True)
    watch.until(lambda: not watch.attendance.known)


def told_to_end(watch: Watch, processes: str, known: str = "", reported: str = "") -> str:
    """The processes, a letter each, that are told to end when these come online one after another.

    reported: had its report, with the key, read before any presence, as after a restart of the node.
    """
    inbox, ended = watch.connect("inbox"), ""
    inbox.subscribe(topics.inbox(watch.fleet, "d", topics.ANY))
    watch.start()
    if reported:
        watch.attendance.vouch("d", reported)
    for number, process in enumerate(processes):
        watch.say("d", "online", 100 - number, process)  # a clock behind the first one's changes nothing
        watch.settle()
        if process in known:
            watch.attendance.vouch("d", process)
    watch.session.publish(topics.inbox(watch.fleet, "d", "last"), b"x")
    while not ended.endswith("last"):
        item = inbox.receive(20)
        assert item is not None
        ended += topics.parse(item.topic).transfer if isinstance(item, Message) else ""
    return ended.removesuffix("last")


@pytest.mark.parametrize(
    ("processes", "known", "ended"),
    [
        pytest.param("abab", "", "b", id="the younger"),
        pytest.param("abab", "ab", "b", id="the younger of two with the key"),
        pytest.param("aba", "b", "a", id="the one without the key"),
        pytest.param("abcabc", "", "bc", id="all but the eldest"),
        pytest.param("aba", "", "", id="none: one was stopped again"),
        pytest.param("aaaaaa", "", "", id="none: one reconnects"),
        pytest.param("abcdefghijkk", "", "", id="none: restarts"),
    ],
)
def test_of_agents_that_take_over_each_other_all_but_one_are_told_to_end(
    watch: Watch, processes: str, known: str, ended: str
) -> None:
    assert told_to_end(watch, processes, known) == ended
    assert any("two agents have the id d" in text for text in watch.news) == bool(ended)


@pytest.mark.parametrize(
    ("reported", "ended"),
    [
        pytest.param("b", "a", id="the one without the key"),
        pytest.param("a", "b", id="the younger, without the key"),
        pytest.param("z", "b", id="the younger: the report is of neither"),
    ],
)
def test_a_report_that_came_before_its_agents_presence_tells_the_device_from_the_other(
    watch: Watch, reported: str, ended: str
) -> None:
    assert set(told_to_end(watch, "abab", reported=reported)) == {ended}
