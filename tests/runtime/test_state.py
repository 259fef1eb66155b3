"""What several processes want is made once, and a killed one leaves nothing behind for long."""

import subprocess
import sys

import pytest

from edge_runtime.state import once

KILLED = """
import os, pathlib, signal, sys
from edge_runtime.state import once

def make(fresh):
    fresh.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)

once(pathlib.Path(sys.argv[1]), make)
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
