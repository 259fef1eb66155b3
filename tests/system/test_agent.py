"""An agent whose rounds do not come one after the other as they should."""

import contextlib
import shutil
import signal
import sqlite3
import time
from pathlib import Path

import numpy as np
from crafted import crafted
from edge_broker import messages, topics
from edge_broker.session import Session
from edge_broker.transfer import Committed
from filelock import FileLock
from fleet import Command, Fleet, eventually
from records import await_round, committed, job, owes, presence_of, remembered, reports

from benchmarks.noise_node import NOISE
from edge_runtime.errors import UnreachableError
from edge_runtime.protocol import codec

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
    with crafted(fleet, "other") as second:
        # As the broker does, a minute after such a silence.
        declare_lost(second.session, fleet, "late")
        second.report()
        assert isinstance(second.offer(DELTA), Committed)
        assert node.phase("merged")["missing"] == ["late"]
    agent.process.send_signal(signal.SIGCONT)
    assert "round 1 is closed" in agent.phase("rejected")["text"]
    node.phase("received")
    agent.until(lambda event: event["phase"] == "waiting" and event["round"] == 2)
    carried = job(fleet, "late", 2)["carried"]
    assert carried["unsent"].endswith("round-1/payload.bin")
    assert carried["residual"].endswith("round-1/residual.bin")
    memory = remembered(fleet, "late")
    assert memory["residual"] == "2" and "unsent" not in memory
    assert committed(fleet) == [("late", 2), ("other", 1)]


def owing(fleet: Fleet, device: str) -> Command:
    """An agent with an update for a node that was killed before it could take one."""
    fleet.write(deadline_s=60)
    node = fleet.noise_node()
    node.phase("collecting")
    await_round(fleet)
    node.kill()
    agent = fleet.noise(device, "10kB", "--until-finished")
    agent.phase("connected")
    assert eventually(lambda: owes(fleet, device))
    return agent


def test_an_update_that_is_refused_after_the_last_round_does_not_keep_the_agent_from_its_end(
    fleet: Fleet,
) -> None:
    owing(fleet, "late").kill()
    node = fleet.noise_node("--until-finished")
    with crafted(fleet, "other") as second:
        second.report()
        assert isinstance(second.offer(b"noise", model_class=NOISE), Committed)
        node.phase("finishing")  # and the other one, which is still here, has not ended
        agent = fleet.noise("late", "10kB", "--until-finished")
        assert agent.end(40) == 0
    assert node.end(40) == 0
    assert set(reports(fleet, "finished")) == {("late", 1)}
    assert [event["phase"] for event in agent.seen + node.seen].count("failed") == 0
    assert committed(fleet) == [("other", 1)]


def test_an_agent_does_not_wait_for_ever_for_the_word_of_a_node_that_has_gone(fleet: Fleet) -> None:
    owing(fleet, "late").kill()
    node = fleet.noise_node("--until-finished")
    with crafted(fleet, "other") as second:
        second.report()
        assert isinstance(second.offer(b"noise", model_class=NOISE), Committed)
        second.report(state="finished")
    assert node.end(40) == 0
    agent = fleet.noise("late", "10kB", "--until-finished", "--wait", "2")
    assert agent.end(40) == UnreachableError.exit_code
    assert "has not answered the last update within 2 s; the update is kept" in agent.error()


def test_a_device_whose_first_report_was_lost_says_again_who_it_is(fleet: Fleet) -> None:
    agent = owing(fleet, "a")
    with contextlib.closing(sqlite3.connect(fleet.folder / "node" / "node.db")) as database:
        assert database.execute("SELECT count(*) FROM devices").fetchone() == (0,)
    with Session(fleet.broker.url, f"{fleet.name}-forgets", session_expiry_s=0) as session:
        session.connect(10)
        session.publish(topics.report(fleet.name, "a"), b"", retain=True)
    node = fleet.noise_node("--until-finished")
    agent.until(lambda event: "device a is not enrolled" in event.get("text", ""), 40)
    assert (agent.end(40), node.end(40)) == (0, 0)
    assert committed(fleet) == [("a", 1)]


def test_a_round_that_opens_while_the_agent_plans_is_trained_once(fleet: Fleet, real_model: str) -> None:
    (lock,) = (fleet.cache / "models").glob("SmolLM2*.Q4_1-*.lock")
    fleet.write((real_model, 2), rounds=2, deadline_s=2, extensions=100)
    node = fleet.node()
    node.phase("collecting")
    with (
        FileLock(lock),
        crafted(fleet, "other") as second,
    ):  # the agent cannot read its model's facts meanwhile
        agent = fleet.agent("slow")
        agent.phase("planning")
        second.report()
        assert isinstance(second.offer(DELTA), Committed)
        agent.until(lambda event: event["phase"] == "planning" and event["round"] == 2)
    agent.until(lambda event: event["phase"] == "waiting" and event["round"] == 2)
    assert [event["phase"] for event in agent.seen].count("starting") == 1
    assert committed(fleet) == [("other", 1), ("slow", 2)]


def test_fresh_states_make_a_new_fleet_of_an_old_name(fleet: Fleet) -> None:
    """The broker keeps the old node's round and the old device's report; neither ties the new."""
    fleet.write()
    ended = [fleet.noise_node("--until-finished"), fleet.noise("a", "10kB", "--until-finished")]
    assert [command.end() for command in ended] == [0, 0]
    for name in ("node", "a"):
        shutil.rmtree(fleet.folder / name)
    agent = fleet.noise("a", "10kB", "--until-finished")
    agent.phase("fetching")  # what the old node published, which nobody serves any more
    node = fleet.noise_node("--until-finished")
    assert (node.end(), agent.end()) == (0, 0)
    assert committed(fleet) == [("a", 1)]
    assert not any(event["phase"] == "failed" for event in agent.seen + node.seen)


def test_a_device_that_trained_for_a_node_follows_no_other_one(fleet: Fleet) -> None:
    fleet.write()
    ended = [fleet.noise_node("--until-finished"), fleet.noise("a", "10kB", "--until-finished")]
    assert [command.end() for command in ended] == [0, 0]
    shutil.rmtree(fleet.folder / "node")
    fleet.noise_node().phase("collecting")
    agent = fleet.noise("a", "10kB", "--wait", "2")
    assert agent.end() == 3
    assert "to trust that node, start with a new --state" in agent.error()


def test_an_agent_asked_to_stop_while_it_trains_takes_its_trainer_along(
    fleet: Fleet, real_model: str
) -> None:
    fleet.write((real_model, 2))
    fleet.node()
    agent = fleet.agent("a")
    agent.phase("load")
    trainers = agent.children()
    assert trainers
    agent.process.terminate()
    assert agent.end(20) == 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in trainers)
    assert presence_of(fleet, "a") == "offline"


def declare_lost(session: Session, fleet: Fleet, device: str) -> None:
    """Say of a device what its will would say."""
    lost = messages.Presence(state="lost", epoch=time.time_ns() // 1_000_000)
    session.publish(topics.presence(fleet.name, device), messages.encode(lost), retain=True)
