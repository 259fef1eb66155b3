"""Processes die and devices misbehave; rounds go on, and nothing counts twice."""

import contextlib
import sqlite3
import time
from pathlib import Path

import numpy as np
import pytest
from crafted import crafted
from edge_broker.transfer import Committed, Rejected
from fleet import Fleet, eventually
from records import committed, master, presence_of, reports

from edge_runtime.protocol import codec


def test_a_device_that_vanishes_is_named_and_not_waited_for(fleet: Fleet, tiny_model: Path) -> None:
    fleet.write((str(tiny_model), 4), quorum=1, deadline_s=120, steps=200)
    node = fleet.node()
    node.phase("collecting")
    gone = fleet.agent("gone")
    gone.phase("train")
    honest = fleet.agent("honest")
    honest.phase("starting")
    gone.kill()
    merged = node.phase("merged")
    assert merged["in_"] == ["honest"] and merged["missing"] == ["gone"]


@pytest.mark.parametrize("moment", ["received", "collecting"])
def test_a_killed_aggregator_goes_on_in_the_same_round(fleet: Fleet, moment: str) -> None:
    fleet.write(quorum=2, rounds=2)
    node = fleet.noise_node("--until-finished")
    node.phase("collecting")
    first = fleet.noise("first", "200kB", "--until-finished")
    node.phase("received") if moment == "received" else first.phase("connected")
    node.kill()
    again = fleet.noise_node("--until-finished")
    again.phase("collecting")
    second = fleet.noise("second", "200kB", "--until-finished")
    assert (again.end(), first.end(), second.end()) == (0, 0, 0)
    assert committed(fleet) == [("first", 1), ("first", 2), ("second", 1), ("second", 2)]


def test_a_killed_agent_takes_its_trainer_along_and_trains_again(fleet: Fleet, tiny_model: Path) -> None:
    fleet.write((str(tiny_model), 4), steps=60)
    node = fleet.node("--until-finished")
    agent = fleet.agent("a", "--until-finished")
    agent.phase("train")
    trainers = agent.children()
    assert trainers
    agent.kill()
    assert eventually(lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in trainers))
    again = fleet.agent("a", "--until-finished")
    assert (again.end(), node.end()) == (0, 0)
    assert committed(fleet) == [("a", 1)]


def test_a_delta_that_waits_in_the_outbox_is_sent_without_training_again(
    fleet: Fleet, tiny_model: Path
) -> None:
    fleet.write((str(tiny_model), 4))
    node = fleet.node("--until-finished")
    agent = fleet.agent("a", "--until-finished")
    agent.phase("train")
    node.kill()  # nobody will take the delta
    agent.phase("sending")
    agent.kill()
    node, again = fleet.node("--until-finished"), fleet.agent("a", "--until-finished")
    assert (again.end(), node.end()) == (0, 0)
    assert "train" not in {event["phase"] for event in again.seen}
    assert committed(fleet) == [("a", 1)]


def tensors(key: str, shape: tuple[int, int]) -> bytes:
    return codec.encode({key: np.ones(shape, np.float32)})


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"no adapter at all", "no encoded adapter"),
        (tensors("layers.0.q.Z", (2, 8)), "layers.0.q.Z"),
        (tensors("layers.0.nose.A", (2, 8)), "layers.0.nose.A"),
        (tensors("layers.0.q.A", (3, 8)), "has to be"),
        (tensors("layers.0.q.A", (2, 8))[:-6], "bytes of sections"),
        (codec.encode({"layers.0.q.A": np.full((2, 8), 1e6, np.float32)}), "diverged"),
    ],
)
def test_a_bad_delta_is_refused_with_its_reason(fleet: Fleet, payload: bytes, reason: str) -> None:
    fleet.write()
    node = fleet.node()
    node.phase("collecting")
    with crafted(fleet, "crafted") as device:
        device.report()
        refusal = device.offer(payload)
    assert isinstance(refusal, Rejected)
    assert reason in refusal.reason
    assert reason in node.phase("refused")["text"]
    assert committed(fleet) == []


def test_momentum_survives_a_killed_aggregator(fleet: Fleet) -> None:
    fleet.write(rounds=3)
    file = fleet.folder / "fleet.toml"
    stepping = 'name = "fedit"\nserver_step = 2.0\nmomentum = 0.5'
    file.write_text(file.read_text().replace('name = "fedit"', stepping))
    node = fleet.node()
    node.phase("collecting")
    with crafted(fleet, "crafted") as device:
        device.report()
        assert isinstance(device.offer(tensors("layers.0.q.B", (8, 2))), Committed)
        node.phase("merged")
        node.kill()
        node = fleet.node()
        node.phase("collecting")
        assert isinstance(device.offer(tensors("layers.0.q.B", (8, 2)), round=2), Committed)
        node.phase("merged")
    after = [float(master(fleet, round_)["layers.0.q.B"].mean()) for round_ in (1, 2)]
    assert after == pytest.approx([2 * 1, 2 * 1 + 2 * 1.5], rel=1e-2)


def test_an_agent_that_is_asked_to_stop_says_offline(fleet: Fleet) -> None:
    fleet.write()
    agent = fleet.agent("a")
    agent.phase("connected")
    agent.process.terminate()
    assert agent.end(20) == 0
    assert presence_of(fleet, "a") == "offline"


def test_an_agent_that_missed_the_nodes_word_on_its_last_update_asks_for_it_before_it_ends(
    fleet: Fleet,
) -> None:
    fleet.write(deadline_s=60)
    node = fleet.noise_node("--until-finished")
    node.phase("collecting")
    with crafted(fleet, "mute"):  # keeps the round open
        node.until(lambda event: event.get("text") == "mute is online")
        agent = fleet.noise("a", "10kB")
        agent.until(lambda event: event.get("text") == "the node took round 1")
        agent.kill()
        with contextlib.closing(sqlite3.connect(fleet.folder / "a" / "agent.db")) as database, database:
            database.execute("UPDATE outbox_update SET state = 'pending'")
        node.kill()
        agent = fleet.noise("a", "10kB", "--until-finished")
        agent.phase("waiting")
        time.sleep(2.5)  # it has asked twice and will not ask again before the round is over
    again = fleet.noise_node("--until-finished")
    assert (agent.end(40), again.end(40)) == (0, 0)
    assert set(reports(fleet, "finished")) == {("a", 1)}
