"""What a service may lack: a home, a user's name, UTF-8, standard output."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import results
from crafted import crafted
from fleet import Fleet

from edge_runtime.protocol.report import Score

EDGE_RUNTIME = [sys.executable, "-m", "edge_runtime.cli"]
UID = "54321"  # of a user that /etc/passwd does not have
# the user may read a Python that lies in root's home
BECOME = ["setpriv", "--reuid", UID, "--regid", UID, "--clear-groups"]
READS = ["--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search"]
MODEL, MODEL_IN_ASCII = "äß模型😀", r"\xe4\xdf\u6a21\u578b\U0001f600"
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def nobody() -> Iterator[Start]:
    """nobody(words, **variables): start a command as a user without a name and a home, in a folder of their own."""
    if os.name != "posix" or os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("needs root and setpriv, to become another user")

    def start(*words: str, **variables: str) -> "subprocess.Popen[str]":
        python_path = os.pathsep.join(path for path in sys.path if path)
        given = {"PATH": os.environ["PATH"], "PYTHONPATH": python_path, "PYTHONDONTWRITEBYTECODE": "1"}
        return subprocess.Popen(
            [*BECOME, *READS, *words],
            env=given | variables,
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            umask=0o077,
        )

    with TemporaryDirectory() as folder:  # pytest's folders are root's alone
        os.chmod(folder, 0o777)
        yield start


def test_the_given_cache_is_used_without_asking_for_a_home(nobody: Start) -> None:
    code = "from edge_runtime.planning.processes import cache_folder; print(cache_folder())"
    with nobody(sys.executable, "-c", code, EDGE_RUNTIME_CACHE="given") as process:
        assert process.communicate() == ("given\n", "")


@pytest.mark.parametrize("variables", [{}, {"HOME": "/"}, {"HOME": "/nowhere"}])
def test_without_a_place_for_a_cache_the_variable_to_set_is_named(nobody: Start, variables: dict) -> None:
    with nobody(*EDGE_RUNTIME, "profile", **variables) as process:
        _, error = process.communicate()
    assert process.returncode == 2
    assert "set EDGE_RUNTIME_CACHE to a folder" in error and "Traceback" not in error


@pytest.mark.parametrize("kind", ["embedded", "auto"])
def test_a_broker_needs_no_user(nobody: Start, kind: str) -> None:
    command = [*EDGE_RUNTIME, "broker", "--kind", kind, "--port", "0", "--state", "state", "--json"]
    with nobody(*command) as process:
        assert "url" in json.loads(process.stdout.readline()), process.stderr.read()
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


def status(fleet: Fleet, encoding: str, *more: str) -> str:
    command = [*EDGE_RUNTIME, "status", "--broker", fleet.broker.url, "--fleet", fleet.name, *more]
    variables = {"PYTHONIOENCODING": encoding, "COLUMNS": "300"}
    process = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, timeout=60)
    assert process.returncode == 0, process.stderr.decode()
    return process.stdout.decode(encoding)


def test_characters_that_the_output_cannot_have_are_escaped(fleet: Fleet) -> None:
    fleet.write()
    fleet.noise_node().phase("collecting")
    score = {MODEL: Score(1.0, 0.5, 2)}
    result = results.result(score)
    with crafted(fleet, "here") as device:
        device.report(state="trained", result=result)
        assert r"äß\u6a21\u578b\U0001f600" in status(fleet, "iso-8859-1")
        assert MODEL_IN_ASCII in status(fleet, "ascii")
        line = status(fleet, "iso-8859-1", "--json")
        assert line.isascii()
        assert list(json.loads(line)["devices"][0]["report"]["result"]["evaluation"]) == [MODEL]


@pytest.mark.parametrize("closed", ["<&- >&-", "<&- >&- 2>&-", "2>&-", "> /dev/full"])
def test_an_exit_code_needs_no_stream(closed: str) -> None:
    words = f'exec "{sys.executable}" -m edge_runtime.cli plan --fleet nowhere.toml {closed}'
    assert subprocess.run(["sh", "-c", words], timeout=60).returncode == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_behind_the_output_is_told(tmp_path: Path) -> None:
    words = f'exec "{sys.executable}" -m edge_runtime.cli broker --port 0 --state "{tmp_path}" > /dev/full'
    process = subprocess.run(["sh", "-c", words], stderr=subprocess.PIPE, text=True, timeout=60)
    assert process.returncode == 2
    assert "No space left on device" in process.stderr and len(process.stderr.splitlines()) == 1


def test_a_name_is_utf8_whatever_the_locale(tmp_path: Path) -> None:
    (tmp_path / MODEL).mkdir()
    file = tmp_path / f"{MODEL}.toml"
    file.write_text(f'[fleet]\nname = "x"\n[[catalog]]\nsource = "{MODEL}"\n', encoding="utf-8")
    variables = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    command = [*EDGE_RUNTIME, "plan", "--fleet", str(file), "--models", str(tmp_path)]
    process = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, timeout=60)
    assert process.returncode == 2
    assert rf"{tmp_path}/{MODEL_IN_ASCII} has no config.json" in process.stderr.decode("ascii")


def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    command = [*EDGE_RUNTIME, "demo", "--keep", str(tmp_path), "--method", b"\xff"]
    process = subprocess.run(command, capture_output=True, timeout=60)
    assert process.returncode == 2
    assert (
        process.stderr.decode()
        == r"edge-runtime: '\udcff' in a name or a text is not UTF-8: give it another name"
        "\n"
    )
