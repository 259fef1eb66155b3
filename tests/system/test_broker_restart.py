"""The broker goes away and comes back without its memory; the fleet goes on where it was."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from crafted import crafted
from edge_broker.local import Broker, find_mosquitto, free_port, start_broker
from fleet import Command, Fleet, eventually
from records import committed, presence_of


class Restartable:
    """A broker whose stop and start keep the address and lose everything else."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._running: Broker = start_broker(state_dir=folder)
        self.url = self._running.url

    def stop(self) -> None:
        self._running.stop()

    def start(self) -> None:
        self._running = start_broker(port=self._running.port, state_dir=self._folder)


@pytest.fixture
def restartable(tmp_path: Path, fleet: Fleet) -> Iterator[Restartable]:
    """A broker of this test's own, which its fleet uses."""
    broker = Restartable(tmp_path / "own-broker")
    fleet.broker = broker  # type: ignore[assignment]
    yield broker
    broker.stop()


def still_runs(command: Command, for_s: float) -> bool:
    try:
        command.process.wait(for_s)
    except subprocess.TimeoutExpired:
        return True
    return False


def test_a_device_that_comes_after_a_restart_is_told_the_round(
    fleet: Fleet, restartable: Restartable
) -> None:
    fleet.write()
    node = fleet.noise_node("--until-finished")
    node.phase("collecting")
    restartable.stop()
    restartable.start()
    agent = fleet.noise("a", "10kB", "--until-finished", "--wait", "20")
    assert (agent.end(40), node.end(40)) == (0, 0)


def test_an_outage_does_not_count_against_the_deadline(fleet: Fleet, restartable: Restartable) -> None:
    # Within the deadline an agent has to start and send, on a slow machine too.
    fleet.write(deadline_s=8, extensions=0)
    node = fleet.noise_node("--until-finished")
    node.phase("collecting")
    restartable.stop()
    assert still_runs(node, 10), node.error()
    restartable.start()
    longer_than_its_back_off = "60"  # the node may look for its broker 30 s after it last did
    agent = fleet.noise("a", "10kB", "--until-finished", "--wait", longer_than_its_back_off)
    assert (agent.end(), node.end()) == (0, 0)


def test_an_agent_killed_during_an_outage_sends_what_it_owes_without_training_again(
    fleet: Fleet, restartable: Restartable, real_model: str
) -> None:
    fleet.write((real_model, 2))
    node = fleet.node("--until-finished")
    agent = fleet.agent("a", "--until-finished")
    agent.phase("train")
    restartable.stop()
    agent.phase("sending")
    agent.kill()
    restartable.start()
    again = fleet.agent("a", "--until-finished")
    assert (again.end(), node.end()) == (0, 0)
    assert "train" not in {event["phase"] for event in again.seen}
    assert committed(fleet) == [("a", 1)]


@pytest.fixture
def persistent(tmp_path: Path, fleet: Fleet) -> Iterator[Callable[[], "subprocess.Popen[bytes]"]]:
    """Start a Mosquitto that saves each change in a file, at the one address that the test's fleet uses."""
    if not find_mosquitto():
        pytest.skip("Mosquitto is not installed")
    port, config = free_port(), tmp_path / "mosquitto.conf"
    config.write_text(
        f"listener {port} 127.0.0.1\nallow_anonymous true\nuser root\npersistence true\n"
        f"persistence_location {tmp_path}/\nautosave_interval 1\nautosave_on_changes true\n"
    )
    fleet.broker = SimpleNamespace(url=f"mqtt://127.0.0.1:{port}")  # type: ignore[assignment]
    started: list[subprocess.Popen[bytes]] = []

    def start() -> "subprocess.Popen[bytes]":
        command = [str(find_mosquitto()), "-c", str(config)]
        started.append(subprocess.Popen(command, stderr=subprocess.DEVNULL))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait(5)


def test_a_device_that_lost_power_together_with_the_broker_is_not_waited_for_again_and_again(
    fleet: Fleet, persistent: Callable[[], "subprocess.Popen[bytes]"], tmp_path: Path
) -> None:
    broker = persistent()
    fleet.write(rounds=3, deadline_s=3600)
    node = fleet.noise_node("--until-finished")
    node.phase("collecting")
    with crafted(fleet, "mute"):  # keeps the first round open
        node.until(lambda event: event.get("text") == "mute is online")
        ghost = fleet.noise("ghost", "10kB")
        node.phase("received")
        assert eventually(lambda: b'"online"' in (tmp_path / "mosquitto.db").read_bytes())
        broker.kill()
        broker.wait(5)
        ghost.kill()
    persistent()
    node.until(lambda event: "ghost is online for the broker, but has not answered" in event["text"])
    assert presence_of(fleet, "ghost") == "online"
    agent = fleet.noise("a", "10kB", "--until-finished")
    assert (agent.end(), node.end()) == (0, 0)
    assert committed(fleet) == [("a", 2), ("a", 3), ("ghost", 1)]
