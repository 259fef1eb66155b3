"""The broker goes away and comes back without its memory; the fleet goes on where it was."""

import queue
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from types import SimpleNamespace

import pytest
from crafted import crafted
from edge_broker import address
from edge_broker.local import Broker, find_mosquitto, free_port, start_broker
from edge_broker.transfer import Committed
from fleet import Fleet, eventually
from records import committed, presence_of

from benchmarks import noise_node
from edge_runtime import settings
from edge_runtime.aggregator.node import Exchange, Node, NodeOptions


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


def test_an_outage_does_not_count_against_the_deadline(
    fleet: Fleet, restartable: Restartable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Node and device are of this process: the one connects again at once, the other has started already."""
    monkeypatch.setattr("edge_broker.connection._BACKOFF_S", (0.1, 0.2))
    deadline_s = 3.0
    fleet.write(deadline_s=deadline_s, extensions=0)
    phases: queue.SimpleQueue[str] = queue.SimpleQueue()

    def serve() -> None:
        options = NodeOptions(address.parse(restartable.url), fleet.folder / "node", "node", True)
        exchange = Exchange(noise_node.check, noise_node.merge)
        file = settings.load(fleet.folder / "fleet.toml")
        Node(file, options, lambda event: phases.put(event.phase), exchange).run()

    with ThreadPoolExecutor(1) as pool:
        node = pool.submit(serve)
        assert phases.get(timeout=20) == "collecting"
        restartable.stop()
        assert not wait([node], deadline_s + 1).done, node.exception()
        restartable.start()
        with crafted(fleet, "a") as device:
            device.report(state="joined")
            assert isinstance(device.offer(b"noise", model_class=noise_node.NOISE), Committed)
            device.report(state="finished")
        assert node.exception(20) is None
    assert committed(fleet) == [("a", 1)]


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
