"""For whom a round waits, and for how long."""

import itertools
import time

import pytest
from crafted import crafted
from edge_broker import topics
from edge_broker.session import Message, Session
from edge_broker.transfer import Committed
from fleet import Fleet
from records import committed

from benchmarks import noise_node

NOISE = {"model_class": noise_node.NOISE}


def test_a_device_that_failed_is_not_waited_for(fleet: Fleet) -> None:
    fleet.write(deadline_s=60)
    node = fleet.noise_node()
    node.phase("collecting")
    with crafted(fleet, "failing") as failing:
        failing.report(state="failed", cause="disk")
        assert "failing: disk: " in node.phase("failed")["text"]
        fleet.noise("honest", "10kB")
        merged = node.phase("merged", 20)
    assert merged["in_"] == ["honest"] and merged["missing"] == ["failing"]


def test_a_device_that_failed_and_joins_again_is_waited_for(fleet: Fleet) -> None:
    fleet.write(deadline_s=60)
    node = fleet.noise_node()
    node.phase("collecting")
    with crafted(fleet, "returning") as returning:
        returning.report(state="failed", cause="disk")
        node.phase("failed")
        returning.report(state="joined")
        fleet.noise("honest", "10kB")
        node.phase("received")
        with pytest.raises(AssertionError, match="not seen"):
            node.phase("merged", 2)
        assert isinstance(returning.offer(b"noise", **NOISE), Committed)
    assert node.phase("merged", 20)["in_"] == ["honest", "returning"]


def test_a_device_that_stays_mute_is_waited_for_until_the_deadline(fleet: Fleet) -> None:
    fleet.write(deadline_s=3)
    node = fleet.noise_node()
    node.phase("collecting")
    announced = time.monotonic()
    with crafted(fleet, "mute"):
        node.until(lambda event: event.get("text") == "mute is online")
        fleet.noise("honest", "10kB")
        merged = node.phase("merged", 20)
    assert time.monotonic() - announced > 2.5
    assert merged["in_"] == ["honest"] and merged["missing"] == ["mute"]


def test_a_fleet_below_its_quorum_ends_by_naming_who_is_missing(fleet: Fleet) -> None:
    fleet.write(quorum=2, deadline_s=1.5, extensions=1)
    node = fleet.noise_node()
    fleet.noise("here", "10kB")
    with crafted(fleet, "mute"):
        extended = node.phase("extended", 20)
        assert node.end(20) == 1
    assert extended["in_"] == ["here"] and extended["missing"] == ["mute"]
    error = node.error()
    assert "1 of the 2 updates" in error and "missing: mute" in error


def test_a_node_killed_between_its_last_commit_and_the_merge_merges_once(fleet: Fleet) -> None:
    fleet.write(deadline_s=60)
    node = fleet.noise_node("--until-finished")
    node.phase("collecting")
    with crafted(fleet, "mute"):  # keeps the round open after the only update
        node.until(lambda event: event.get("text") == "mute is online")
        agent = fleet.noise("honest", "100kB", "--until-finished")
        node.phase("received")
        node.kill()
    again = fleet.noise_node("--until-finished")
    assert again.phase("merged", 20)["in_"] == ["honest"]
    assert (again.end(20), agent.end(20)) == (0, 0)
    assert "received" not in {event["phase"] for event in again.seen}
    assert committed(fleet) == [("honest", 1)]


def test_an_agent_shows_that_it_is_there_when_a_node_announces_its_round_again(fleet: Fleet) -> None:
    fleet.write(quorum=2)
    node = fleet.noise_node()
    fleet.noise("a", "10kB")
    node.phase("received")  # the agent rests, until the second device is in
    node.kill()
    with Session(fleet.broker.url, f"{fleet.name}-hears", session_expiry_s=0) as session:
        session.connect(10)
        session.subscribe(topics.presence(fleet.name, "a"))
        fleet.noise_node()
        while not (isinstance(item := session.receive(20), Message) and not item.retained):
            assert item is not None
    assert b'"online"' in item.payload


def test_of_two_agents_with_one_id_one_ends_with_a_sentence_and_the_other_finishes(fleet: Fleet) -> None:
    fleet.write(rounds=2, quorum=2)  # so the first round stays open for a second device
    node = fleet.noise_node("--until-finished")
    node.phase("collecting")
    agents = [fleet.noise("pi", "10kB", "--state", str(fleet.folder / name)) for name in ("one", "two")]
    node.until(lambda event: "two agents have the id pi" in event.get("text", ""), 60)
    ended = next(agent for agent in itertools.cycle(agents) if agent.process.poll() is not None)
    other = fleet.noise("other", "10kB", "--until-finished")
    assert (ended.end(), other.end(), node.end()) == (2, 0, 0)
    sentence = ended.error().splitlines()[-1]
    assert "another agent is connected to" in sentence and "as device `pi` of fleet" in sentence
    assert [agent.process.poll() for agent in agents].count(None) == 1
