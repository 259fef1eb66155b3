"""A command after each version: what it is given, and what happens when it fails, hangs or is slow."""

import json
import queue
import shlex
import sys

import pytest
from fleet import eventually

from edge_runtime.agent.hook import Hook, words
from edge_runtime.errors import InputError

TOLD = """
import json, os, pathlib, sys
folder = pathlib.Path(sys.argv[-1])
names = ("EDGE_RUNTIME_VERSION", "EDGE_RUNTIME_ADAPTER", "EDGE_RUNTIME_BROKER_PASSWORD")
told = {"folder": str(folder), "files": sorted(os.listdir(folder)), **{name: os.environ.get(name) for name in names}}
with open(sys.argv[1], "a") as file:
    file.write(json.dumps(told) + "\\n")
"""


@pytest.fixture
def hook(tmp_path):
    """hook(script, *arguments): a hook that runs a Python script, and the queue of its ends."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")

    def make(script, *arguments, timeout_s=60.0):
        (tmp_path / "hook.py").write_text(script)
        command = shlex.join([sys.executable, str(tmp_path / "hook.py"), *map(str, arguments)])
        ends = queue.Queue()
        return Hook(words(command), adapter, tmp_path, ends.put, timeout_s), ends

    return make


def test_a_command_gets_a_folder_that_stays_as_it_is(hook, tmp_path, monkeypatch):
    monkeypatch.setenv("EDGE_RUNTIME_BROKER_PASSWORD", "secret")
    runs, ends = hook(TOLD, tmp_path / "told")
    runs.run(3)
    assert ends.get(timeout=60).text == "--on-version has run for version 3"
    told = json.loads((tmp_path / "told").read_text())
    folder = str(tmp_path / "on-version" / "3")
    assert told == {
        "folder": folder,
        "files": ["adapter_config.json"],
        "EDGE_RUNTIME_VERSION": "3",
        "EDGE_RUNTIME_ADAPTER": folder,
        "EDGE_RUNTIME_BROKER_PASSWORD": None,
    }
    (tmp_path / "adapter" / "adapter_config.json").write_text("another version")
    assert (tmp_path / "on-version" / "3" / "adapter_config.json").read_text() == "{}"


def test_of_versions_that_come_meanwhile_the_newest_alone_is_told(hook, tmp_path):
    gate = tmp_path / "gate"
    runs, ends = hook(
        f"import os, sys\nwhile not os.path.exists({str(gate)!r}): pass\n" + TOLD, tmp_path / "told"
    )
    runs.run(1)
    assert eventually(lambda: (tmp_path / "on-version" / "1").exists())
    runs.run(2)
    runs.run(3)
    gate.touch()
    assert [ends.get(timeout=60).version for _ in range(2)] == [1, 3]
    told = [json.loads(line)["EDGE_RUNTIME_VERSION"] for line in (tmp_path / "told").read_text().splitlines()]
    assert told == ["1", "3"]


def test_a_command_that_fails_or_hangs_is_told(hook, tmp_path):
    failing, ends = hook("import sys; sys.exit('no disk')")
    failing.run(1)
    assert "--on-version ended with exit code 1; see" in ends.get(timeout=60).text
    assert "no disk" in (tmp_path / "on-version.log").read_text()
    # a child that holds the output is ended too
    hanging, ends = hook("import os, time; os.fork(); time.sleep(1000)", timeout_s=0.5)
    hanging.run(2)
    assert "--on-version took longer than 0.5 s and was ended" in ends.get(timeout=60).text
    hanging.run(3)
    assert ends.get(timeout=60).version == 3


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("no-such-program x", "there is no such program"),
        ("", "no such program"),
        ("a 'b", "is no command: No closing"),
    ],
)
def test_a_command_that_cannot_run_is_refused_at_the_start(command, reason):
    with pytest.raises(InputError, match=f"--on-version is .*{reason}"):
        words(command)
