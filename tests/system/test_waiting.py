"""For whom a round waits, and for how long."""

import time

import pytest
from crafted import crafted
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
