"""What stays resident is small."""

from collections.abc import Callable
from pathlib import Path

import pytest
from fleet import Command, Fleet, resident_bytes

from edge_runtime.trainer import data

MIB = 1 << 20


def mapped(command: Command) -> str:
    return Path(f"/proc/{command.process.pid}/maps").read_text()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_an_idle_agent_takes_at_most_45_mib_and_no_torch(
    fleet: Fleet, record_property: Callable[[str, object], None]
) -> None:
    agent = fleet.agent("a")
    agent.phase("connected")
    record_property("resident MiB", round(resident_bytes(agent) / MIB, 1))
    assert resident_bytes(agent) <= 45 * MIB
    assert "torch" not in mapped(agent) and "numpy" not in mapped(agent)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_an_agent_takes_no_more_with_many_rows_and_has_not_taken_more_while_it_checked_them(
    fleet: Fleet, record_property: Callable[[str, object], None]
) -> None:
    rows = ({"text": f"row {number} " + "of a device with many rows " * 6} for number in range(100_000))
    data.write_rows(fleet.rows, rows)
    agent = fleet.agent("a")
    agent.phase("connected")
    record_property("MiB at most", round(resident_bytes(agent, "VmHWM") / MIB, 1))
    assert resident_bytes(agent, "VmHWM") <= 45 * MIB


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_an_aggregator_without_devices_takes_at_most_60_mib_and_no_torch(
    fleet: Fleet, record_property: Callable[[str, object], None]
) -> None:
    fleet.write()
    node = fleet.node()
    node.phase("collecting")
    record_property("resident MiB", round(resident_bytes(node) / MIB, 1))
    assert resident_bytes(node) <= 60 * MIB
    assert "torch" not in mapped(node)
    assert "numpy" in mapped(node)  # the check can see a library that is there
