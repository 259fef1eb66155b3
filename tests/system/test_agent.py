"""An agent whose rounds do not come one after the other as they should."""

import signal
from pathlib import Path

import numpy as np
from crafted import crafted
from edge_broker import messages, presence, topics
from edge_broker.session import Message, Session
from edge_broker.transfer import Committed
from filelock import FileLock
from fleet import Fleet
from records import committed, job, remembered

from edge_runtime import codec

DELTA = codec.encode({"layers.0.q.A": np.ones((2, 8), np.float32)})


def test_a_refused_update_is_carried_into_the_next_round(fleet: Fleet, real_model: str) -> None:
    fleet.write((real_model, 2), rounds=2)
    node = fleet.node()
    agent = fleet.agent("late")
    agent.phase("train")
    node.kill()
    agent.phase("sending")
    agent.process.send_signal(signal.SIGSTOP)
    node = fleet.node()
    with crafted(fleet, "other") as other:
        declare_lost(other.session, fleet, "late")  # as the broker does, a minute after such a silence
        other.report()
        assert isinstance(other.offer(DELTA), Committed)
        assert node.phase("merged")["missing"] == ["late"]
    agent.process.send_signal(signal.SIGCONT)
    assert "round 1 is closed" in agent.phase("rejected")["text"]
    node.phase("received")
    agent.until(lambda event: event["phase"] == "waiting" and event["round"] == 2)
    carried = job(fleet, "late", 2)
    assert carried["unsent"].endswith("round-1/payload.bin")
    assert carried["residual"].endswith("round-1/residual.bin")
    kept = remembered(fleet, "late")
    assert kept["residual"] == "2" and "unsent" not in kept
    assert committed(fleet) == [("late", 2), ("other", 1)]


def test_a_round_that_opens_while_the_agent_plans_is_trained_once(fleet: Fleet, real_model: str) -> None:
    (lock,) = (fleet.cache / "models").glob("*.lock")
    fleet.write((real_model, 2), rounds=2, deadline_s=2, extensions=100)
    node = fleet.node()
    node.phase("collecting")
    with FileLock(lock), crafted(fleet, "other") as other:  # the agent cannot read its model's facts meanwhile
        agent = fleet.agent("slow")
        agent.phase("planning")
        other.report()
        assert isinstance(other.offer(DELTA), Committed)
        agent.until(lambda event: event["phase"] == "planning" and event["round"] == 2)
    agent.until(lambda event: event["phase"] == "waiting" and event["round"] == 2)
    assert [event["phase"] for event in agent.seen].count("starting") == 1
    assert committed(fleet) == [("other", 1), ("slow", 2)]


def test_an_agent_asked_to_stop_while_it_trains_takes_its_trainer_along(fleet: Fleet, real_model: str) -> None:
    fleet.write((real_model, 2))
    fleet.node()
    agent = fleet.agent("a")
    agent.phase("load")
    threads = Path(f"/proc/{agent.process.pid}/task").glob("*/children")
    trainers = [int(pid) for path in threads for pid in path.read_text().split()]
    assert trainers
    agent.process.terminate()
    assert agent.end(20) == 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in trainers)
    assert state_of(fleet, "a") == "offline"


def declare_lost(session: Session, fleet: Fleet, device: str) -> None:
    """Say of a device what its will would say."""
    lost = messages.Presence(state="lost", epoch=presence.next_epoch(0))
    session.publish(topics.presence(fleet.name, device), messages.encode(lost), retain=True)


def state_of(fleet: Fleet, device: str) -> str:
    """A device's presence, as the broker keeps it."""
    tracker = presence.Tracker()
    with Session(fleet.broker.url, f"{fleet.name}-looks", clean_start=True, session_expiry_s=0) as session:
        session.connect(10)
        session.subscribe(topics.all_presence(fleet.name))
        while tracker.state(device) == "unknown":
            item = session.receive(5)
            assert item is not None
            if isinstance(item, Message):
                tracker.handle(item.topic, item.payload)
    return tracker.state(device)
