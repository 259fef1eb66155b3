"""Fleets at a broker that takes smaller packets than it announces, as Mosquitto does with message_size_limit."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from edge_broker.local import find_mosquitto, free_port
from fleet import Fleet
from records import committed


@pytest.fixture
def limited(tmp_path: Path, fleet: Fleet) -> Iterator[Callable[[int], None]]:
    """Start a Mosquitto of this test's own with a limit in bytes, which its fleet uses."""
    if not find_mosquitto():
        pytest.skip("Mosquitto is not installed")
    started: list[subprocess.Popen[bytes]] = []

    def start(limit: int) -> None:
        port = free_port()
        config = tmp_path / "mosquitto.conf"
        config.write_text(
            f"listener {port} 127.0.0.1\nallow_anonymous true\nuser root\nmessage_size_limit {limit}\n"
        )
        started.append(
            subprocess.Popen([str(find_mosquitto()), "-c", str(config)], stderr=subprocess.DEVNULL)
        )
        fleet.broker = SimpleNamespace(url=f"mqtt://127.0.0.1:{port}")  # type: ignore[assignment]

    yield start
    for process in started:
        process.kill()
        process.wait(5)


def test_a_fleet_finishes_at_a_broker_whose_limit_is_below_a_chunk(
    fleet: Fleet, limited: Callable[[int], None]
) -> None:
    limited(20_000)
    fleet.write(rounds=2)
    node = fleet.noise_node("--until-finished")
    node.phase("collecting")
    agent = fleet.noise("a", "100kB", "--until-finished")
    assert (agent.end(40), node.end(40)) == (0, 0)
    assert committed(fleet) == [("a", 1), ("a", 2)]
    for command in (agent, node):  # 64 KiB and half of that are too large
        assert command.error().count("does not take a packet") == 2


def test_an_update_that_the_broker_does_not_take_however_small_its_chunks_is_given_up_and_reported(
    fleet: Fleet, limited: Callable[[int], None]
) -> None:
    limited(4_000)
    fleet.write()
    node = fleet.noise_node()
    node.phase("collecting")
    agent = fleet.noise("a", "100kB")
    rejected = agent.phase("rejected", 40)
    assert "message_size_limit" in rejected["text"]
    assert "a: link: " in node.phase("failed", 40)["text"]
