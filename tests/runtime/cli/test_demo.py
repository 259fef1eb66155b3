"""How the demo starts its processes, and what it says of them."""

import io
import queue
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from edge_broker import address

from edge_runtime.agent.options import DeviceEvent
from edge_runtime.demo import run
from edge_runtime.demo.commands import DOMAINS
from edge_runtime.demo.live import Live
from edge_runtime.errors import EdgeError


def test_no_process_of_the_demo_has_the_brokers_password_among_its_arguments(tmp_path: Path) -> None:
    broker = address.parse("mqtts://me:hunter2@h:1?ca=/x.pem")
    by_name = run.arguments(tmp_path, broker, dict.fromkeys(DOMAINS, 1 << 30), 1)
    assert by_name.keys() == {"node", *DOMAINS}
    for arguments in by_name.values():
        assert "mqtts://h:1?ca=%2Fx.pem" in arguments
        assert not any("hunter2" in argument or "me:" in argument for argument in arguments)


def shown(tmp_path: Path, kept: bool, capsys: pytest.CaptureFixture[str]) -> str:
    """What a person reads when a device has finished."""
    adapter = tmp_path / "kitchen" / "state" / "adapter"
    finished = DeviceEvent("kitchen", 3, "finished", text=f"the adapter is in {adapter}")
    lines: run.Lines = queue.SimpleQueue()
    lines.put(("kitchen", msgspec.json.encode(finished)))
    lines.put(("kitchen", None))
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        child.wait()
        run.follow({"kitchen": child}, lines, Live({"kitchen": 1 << 30}, 3), tmp_path, kept=kept)
    return "".join(capsys.readouterr().out.split())


def test_where_an_adapter_is_is_told_only_when_it_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert str(tmp_path) in shown(tmp_path, True, capsys)
    deleted = shown(tmp_path, False, capsys)
    assert str(tmp_path) not in deleted and "give--keepFOLDERtokeeptheadapter" in deleted


@pytest.mark.parametrize("kept", [True, False])
def test_a_demo_that_is_silent_sends_nobody_to_logs_that_are_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: bool
) -> None:
    monkeypatch.setattr(run, "SILENCE_S", 0.01)
    with subprocess.Popen([sys.executable, "-c", ""]) as child, pytest.raises(EdgeError) as error:
        run.follow({"node": child}, queue.SimpleQueue(), Live({}, 3), tmp_path, kept=kept)
    assert (str(tmp_path) in str(error.value)) is kept
    assert ("give --keep FOLDER to keep the logs" in str(error.value)) is not kept


@pytest.mark.parametrize(("terminal", "told"), [("dumb", True), ("xterm", False)])
def test_a_terminal_without_a_cursor_gets_lines(
    monkeypatch: pytest.MonkeyPatch, terminal: str, told: bool
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", terminal)
    monkeypatch.setattr(sys, "stdout", shown := Terminal())
    live = Live({"kitchen": 1 << 30}, 3)
    live.show(DeviceEvent("kitchen", 1, "train"))
    assert ("round 1: train" in shown.getvalue()) is told
