"""The command of a version runs when a version is there, also one that an earlier agent has left."""

import json
import queue
import sys
from pathlib import Path

import pytest
from edge_broker import address

from edge_runtime.agent.newest import NewestVersion
from edge_runtime.agent.options import DeviceOptions
from edge_runtime.agent.store import DeviceStore
from edge_runtime.protocol.plan import Plan
from edge_runtime.state import NEWEST

PLAN = Plan("m", "m@1", 4, 4, "float32", 2, 1, 64, {}, 0.0)


@pytest.fixture
def start(tmp_path):
    """start(script): what an agent does with versions, its events, and the state's folder of the newest."""
    folder = tmp_path / NEWEST

    def begin(script):
        broker = address.parse("mqtt://127.0.0.1")
        options = DeviceOptions(
            *(
                broker,
                "fleet",
                "device",
                tmp_path,
                tmp_path,
                1 << 30,
                {},
                tmp_path,
                1,
                "cpu",
                None,
                0.0,
                False,
            ),
            on_version=(sys.executable, "-c", script),
        )
        events = queue.Queue()
        return NewestVersion(options, folder, DeviceStore(Path(":memory:")), events.put), events

    return begin


def publish(tmp_path, number):
    (tmp_path / NEWEST).mkdir()
    (tmp_path / NEWEST / "edge_runtime.json").write_text(json.dumps({"version": number}))


def test_a_command_that_an_earlier_agent_did_not_bring_to_an_end_runs_again(start, tmp_path):
    newest, events = start("import os; os.kill(os.getpid(), 9)")
    newest.look(PLAN)  # there is no version yet
    publish(tmp_path, 1)
    newest.look(PLAN)
    assert "ended with exit code -9 for version 1" in newest.handle(events.get(timeout=60))
    newest.look(PLAN)  # the same folder
    later, more = start("")
    assert later.handle(more.get(timeout=60)) == "--on-version has run for version 1"
    assert events.empty() and more.empty()
