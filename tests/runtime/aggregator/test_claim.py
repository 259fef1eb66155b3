"""One node of a fleet at a broker: the one that was there first, also when it answers late."""

import itertools
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from edge_broker import messages, topics
from edge_broker.local import Broker
from edge_broker.session import Connected, Disconnected, PresenceSpec, Session

from edge_runtime.aggregator import claim
from edge_runtime.errors import InputError, UnreachableError

_numbers = itertools.count()


class Node:
    """A node's session and its claim, which `turn` drives as the node's loop does."""

    def __init__(self, session: Session, fleet: str) -> None:
        self.session, self.claim = session, claim.Claim(session, fleet)
        self.serves, self.refusal = False, ""

    def turn(self) -> None:
        if self.refusal:
            return
        try:
            items = self.claim.admit(self.session.receive(min(self.claim.due_s, 0.002)))
        except InputError as error:
            self.serves, self.refusal = False, str(error)
            self.session.close()
            return
        for item in items:
            self.serves = isinstance(item, Connected) or (self.serves and not isinstance(item, Disconnected))


class Fleet:
    """A fleet's nodes at one broker."""

    def __init__(self, broker: Broker, sessions: ExitStack) -> None:
        self._url, self._sessions, self.name = broker.url, sessions, f"claim-{next(_numbers)}"
        self.nodes: list[Node] = []
        self.outsider = self.connect(None)

    def connect(self, spec: PresenceSpec | None) -> Session:
        session = Session(self._url, f"claim-client-{next(_numbers)}", presence=spec, session_expiry_s=0)
        session.connect(30)
        self._sessions.callback(session.close)
        return session

    def node(self) -> Node:
        self.nodes.append(Node(self.connect(PresenceSpec(self.name, "", at_once=False)), self.name))
        return self.nodes[-1]

    def until(self, holds: Callable[[], object], timeout_s: float = 20.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not holds():
            assert time.monotonic() < deadline
            for node in self.nodes:
                node.turn()

    def say(self, state: str, process: str) -> None:
        """Publish the presence of a node that is not connected."""
        body = messages.encode(messages.Presence(state, 7, process))
        self.outsider.publish(topics.node(self.name), body, retain=True)

    def kept(self) -> messages.Presence:
        """What the broker has of the fleet's node."""
        found: list[bytes] = []
        self.outsider.subscribe(topics.node(self.name))
        while not found:
            item = self.outsider.receive(20)
            found += [item.payload] if getattr(item, "retained", False) else []
        self.outsider.unsubscribe(topics.node(self.name))
        return messages.decode(found[0], messages.Presence)


@pytest.fixture
def fleet(broker: Broker) -> Iterator[Fleet]:
    with ExitStack() as sessions:
        yield Fleet(broker, sessions)


def test_a_second_node_is_refused_and_the_first_goes_on(fleet: Fleet) -> None:
    first = fleet.node()
    fleet.until(lambda: first.serves)
    second = fleet.node()
    fleet.until(lambda: second.refusal)
    assert f"fleet `{fleet.name}` has another node at this broker" in second.refusal
    fleet.until(lambda: fleet.kept().process == first.session.process)  # and not the second one's goodbye
    assert fleet.kept().state == "online" and first.serves and first.session.connected


def test_a_node_of_another_fleet_is_no_second_node(fleet: Fleet, broker: Broker) -> None:
    with ExitStack() as sessions:
        other = Fleet(broker, sessions)
        other.node(), fleet.node()
        other.until(lambda: other.nodes[0].serves)
        fleet.until(lambda: fleet.nodes[0].serves)


def test_of_nodes_that_come_at_once_one_serves(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [fleet.node() for _ in range(3)]
    shown: list[Session] = []
    with monkeypatch.context() as patch:
        patch.setattr(Session, "show_online", lambda session: shown.append(session))
        fleet.until(lambda: len(shown) == 3)
    for session in shown:  # each listens before any of them speaks
        session.show_online()
    fleet.until(lambda: sum(bool(node.refusal) for node in nodes) == 2)
    fleet.until(lambda: sum(node.serves for node in nodes) == 1)


@pytest.mark.parametrize("state", ["lost", "offline"])
def test_a_node_serves_at_once_after_one_that_was_killed_or_stopped(fleet: Fleet, state: str) -> None:
    fleet.say(state, "killed")
    fleet.node()
    fleet.until(lambda: fleet.nodes[0].serves, claim.ANSWER_S / 2)


def test_a_node_does_not_serve_beside_one_that_may_live(
    fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    fleet.say("online", "elder")
    waiting = fleet.node()
    fleet.until(lambda: "waiting up to" in caplog.text)
    later = fleet.node()
    fleet.until(lambda: later.refusal)  # a node that waits was there before this one, too
    assert not waiting.serves
    fleet.say("lost", "elder")
    fleet.until(lambda: waiting.serves)


def test_a_node_that_lost_power_together_with_the_broker_is_waited_for_and_no_longer(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(claim, "ANSWER_S", 0.3)
    fleet.say("online", "ghost")
    node, began = fleet.node(), time.monotonic()
    fleet.until(lambda: node.serves)
    assert time.monotonic() - began >= 0.3 and "no answer in 0.3 s" in caplog.text


def test_a_node_that_was_cut_off_ends_where_another_has_taken_its_place(
    fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    first = fleet.node()
    fleet.until(lambda: first.serves)
    first.session.close()
    second = fleet.node()
    fleet.until(lambda: second.serves)
    first.session.connect(30)
    with caplog.at_level(logging.WARNING):
        fleet.until(lambda: first.refusal)
    assert second.serves and "it is told to end" in caplog.text


def test_a_node_that_comes_back_alone_serves_again(fleet: Fleet) -> None:
    node = fleet.node()
    for _ in range(2):
        fleet.until(lambda: node.serves)
        node.session.close()
        node.serves = False
        node.session.connect(30)
    fleet.until(lambda: node.serves, claim.ANSWER_S / 2)


def test_a_broker_that_hands_no_presence_back_is_named(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "ANSWER_S", 0.3)
    monkeypatch.setattr(Session, "subscribe", lambda *_: None)
    node = fleet.node()
    with pytest.raises(UnreachableError, match="has not handed it back"):
        fleet.until(lambda: node.serves)
