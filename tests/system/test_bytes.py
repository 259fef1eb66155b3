"""Bytes in the reports, beside what a listener on the broker counts for itself."""

from collections import Counter

import pytest
from edge_broker import topics
from edge_broker.session import Message, Session
from edge_broker.window import publish_size
from fleet import Fleet
from records import reports

UP = {"offer", "up", "want", "report"}


def test_bytes_up_and_down_are_those_a_listener_counts(fleet: Fleet) -> None:
    fleet.write(rounds=3)
    counted: Counter[str] = Counter()
    with Session(fleet.broker.url, f"{fleet.name}-listens", session_expiry_s=0) as listener:
        listener.connect(10)
        listener.subscribe(f"edge/1/{fleet.name}/#")
        node = fleet.noise_node("--until-finished")
        node.phase("collecting")
        agent = fleet.noise("a", "200kB", "--until-finished")
        node.until(lambda event: event["phase"] in ("finishing", "finished"))
        while (item := listener.receive(1.0)) is not None:
            if isinstance(item, Message):
                kind = topics.parse(item.topic).kind
                counted["up" if kind in UP else "down"] += publish_size(
                    item.topic.encode(), len(item.payload), None
                )
    assert (node.end(20), agent.end(20)) == (0, 0)
    sent = [*reports(fleet, "trained").values(), *reports(fleet, "finished").values()]
    assert sum(report.bytes_up for report in sent) == pytest.approx(counted["up"], rel=0.03)
    assert sum(report.bytes_down for report in sent) == pytest.approx(counted["down"], rel=0.03)
    assert counted["up"] > 3 * 200_000 and counted["down"] > 3 * 200_000
