"""What several processes want is made once, and a killed one leaves nothing behind for long."""

import subprocess
import sys

import pytest

from edge_runtime.state import LOCK, MARK, once, scratch

KILLED = """
import os, pathlib, signal, sys
from edge_runtime.state import once

def make(fresh):
    fresh.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)

once(pathlib.Path(sys.argv[1]), make)
"""

LEFT = """
import os, pathlib, signal, sys
from edge_runtime.state import scratch

with scratch(pathlib.Path(sys.argv[1])) as folder:
    (folder / "half").touch()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_was_making_is_made_anew_and_its_part_is_gone(tmp_path):
    path = tmp_path / "file"
    assert subprocess.run([sys.executable, "-c", KILLED, path], timeout=60).returncode < 0
    assert not path.exists()
    once(path, lambda fresh: fresh.write_text("whole"))
    once(path, lambda fresh: pytest.fail("made twice"))
    assert path.read_text() == "whole"
    assert {entry.name for entry in tmp_path.iterdir()} <= {"file", "file.lock"}


def test_a_failure_leaves_no_part(tmp_path):
    with pytest.raises(ZeroDivisionError):
        once(tmp_path / "file", lambda fresh: fresh.write_text(str(1 / 0)))
    assert not list(tmp_path.glob("file*.part")) and not (tmp_path / "file").exists()


def test_a_scratch_folder_is_removed_once_its_process_is_dead_and_nobody_elses_is(tmp_path):
    place = tmp_path / "out"
    assert subprocess.run([sys.executable, "-c", LEFT, place], timeout=60).returncode < 0
    (left,) = tmp_path.iterdir()
    assert (left / "half").exists() and left.name.startswith("out.")
    users = tmp_path / "out.mine.part"
    users.mkdir()
    (users / LOCK).touch()  # a lock alone does not make the folder one of ours
    with scratch(place) as running, scratch(tmp_path / "other") as other:
        assert {*tmp_path.iterdir()} == {running, other, users}
    assert [*tmp_path.iterdir()] == [users]
    (users / MARK).touch()
    with scratch(place):
        assert not users.exists()  # so the check can see a folder that is taken for one that was left
