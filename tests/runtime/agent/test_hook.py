"""A command after each version: what it is given, how often it runs, and what happens when it fails or hangs."""

import json
import queue
import shlex
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from fleet import eventually

from edge_runtime.agent import on_version
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
GATED = "import os, sys\nwhile not os.path.exists(sys.argv[1] + '.gate'): pass\n"  # ends when it may


@pytest.fixture
def publish(tmp_path):
    """publish(number): a version takes the place of the one before."""

    def write(number):
        adapter, fresh = tmp_path / "adapter", tmp_path / "fresh"
        fresh.mkdir()
        (fresh / "edge_runtime.json").write_text(json.dumps({"version": number}))
        shutil.rmtree(adapter, ignore_errors=True)
        fresh.rename(adapter)

    return write


@pytest.fixture
def hook(tmp_path):
    """hook(script): a hook of a state folder that runs a Python script, and the queue of its ends."""

    def make(script, timeout_s=60.0):
        (tmp_path / "hook.py").write_text(script)
        command = shlex.join([sys.executable, str(tmp_path / "hook.py"), str(tmp_path / "told")])
        ends = queue.Queue()
        return Hook(words(command), tmp_path, ends.put, timeout_s), ends

    return make


@pytest.fixture
def told(tmp_path):
    """told(): the versions that the command was run for."""
    path = tmp_path / "told"
    return lambda: [json.loads(line)["EDGE_RUNTIME_VERSION"] for line in path.read_text().splitlines()]


def test_a_command_gets_a_folder_that_stays_as_it_is(hook, publish, tmp_path, monkeypatch):
    monkeypatch.setenv("EDGE_RUNTIME_BROKER_PASSWORD", "secret")
    publish(3)
    runs, ends = hook(TOLD)
    runs.run()
    assert ends.get(timeout=60).text == "--on-version has run for version 3"
    folder = str(tmp_path / "on-version" / "3")
    assert json.loads((tmp_path / "told").read_text()) == {
        "folder": folder,
        "files": ["edge_runtime.json"],
        "EDGE_RUNTIME_VERSION": "3",
        "EDGE_RUNTIME_ADAPTER": folder,
        "EDGE_RUNTIME_BROKER_PASSWORD": None,
    }


def test_a_folder_is_the_versions_while_newer_ones_come_and_of_these_the_newest_alone_is_told(
    hook, publish, told, tmp_path
):
    publish(1)
    runs, ends = hook(GATED + TOLD)
    runs.run()
    first = tmp_path / "on-version" / "1" / "edge_runtime.json"
    assert eventually(first.exists)
    for number in (2, 3):
        publish(number)
        runs.run()
    assert json.loads(first.read_text()) == {"version": 1}
    (tmp_path / "told.gate").touch()
    assert [ends.get(timeout=60).text[-1] for _ in range(2)] == ["1", "3"]
    assert told() == ["1", "3"]


@pytest.fixture
def once(tmp_path):
    """once(script): what the process says that runs the script for the newest version."""
    told = str(tmp_path / "told")
    return lambda script: on_version.run(tmp_path, 60.0, [sys.executable, "-c", script, told])


def test_a_command_runs_once_for_a_version_that_is_written_again(once, publish, told, tmp_path):
    """As where devices exchange nothing: a round starts from what the one before has written."""
    assert once(TOLD) == ""
    ends = []
    for number in (0, 1, 1, 2, 2):
        publish(number)
        ends.append(once(TOLD)[-1:])
    assert ends == ["", "1", "", "2", ""] and told() == ["1", "2"]
    # the twin: where success is forgotten, the command runs again
    (tmp_path / "on-version.done").unlink()
    once(TOLD)
    assert told() == ["1", "2", "2"]


def test_a_version_that_is_replaced_while_it_is_copied_is_not_told(once, publish, told, monkeypatch):
    publish(1)
    copied = shutil.copytree

    def slow(source, target):
        copied(source, target)
        publish(2)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copytree", slow)
        assert once(TOLD) == ""
    assert once(TOLD) == "--on-version has run for version 2" and told() == ["2"]


def test_a_command_that_outlives_its_agent_is_waited_for_and_counts(hook, once, publish, told, tmp_path):
    publish(1)
    earlier, _ = hook(GATED + TOLD)
    earlier.run()
    assert eventually((tmp_path / "on-version" / "1").exists)
    with ThreadPoolExecutor() as pool:
        later = pool.submit(once, TOLD)
        (tmp_path / "told.gate").touch()
        assert later.result(60) == ""
    assert told() == ["1"]


def test_a_command_that_was_killed_runs_again(once, publish, told):
    publish(1)
    assert "--on-version ended with exit code -9 for version 1" in once("import os; os.kill(os.getpid(), 9)")
    assert once(TOLD) == "--on-version has run for version 1" and told() == ["1"]


def test_a_command_that_fails_or_hangs_is_told(hook, publish, tmp_path):
    publish(1)
    failing, ends = hook("import sys; sys.exit('no disk')")
    failing.run()
    assert "--on-version ended with exit code 1 for version 1; see" in ends.get(timeout=60).text
    assert "no disk" in (tmp_path / "on-version.log").read_text()
    # a child that holds the output is ended too
    hanging, ends = hook("import os, time; os.fork(); time.sleep(1000)", timeout_s=0.5)
    hanging.run()
    assert "--on-version took longer than 0.5 s and was ended" in ends.get(timeout=60).text
    gone = Hook(("./none",), tmp_path, ends.put)
    gone.run()
    assert "--on-version could not run: [Errno 2]" in ends.get(timeout=60).text


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
