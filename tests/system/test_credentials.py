"""A broker that asks for a password: how a command gets it, and that it stays where it was given."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import psutil
import pytest
from edge_broker import address, credentials
from edge_broker.errors import BrokerUnreachable
from edge_broker.local import find_mosquitto, free_port
from edge_broker.session import Session
from fleet import Command, Fleet

USER, PASSWORD = "dev ice", "p/w#é:@%2F 7ze"
FORMS = [text for text in (PASSWORD, quote(PASSWORD, safe=""), json.dumps(PASSWORD)[1:-1])]


@pytest.fixture(scope="module")
def closed_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Mosquitto that lets in USER with PASSWORD alone."""
    mosquitto, make_file = find_mosquitto(), shutil.which("mosquitto_passwd")
    if not mosquitto or not make_file:
        pytest.skip("Mosquitto is not installed")
    folder = tmp_path_factory.mktemp("closed")
    subprocess.run([make_file, "-b", "-c", folder / "passwords", USER, PASSWORD], check=True)
    port = free_port()
    lines = (f"listener {port} 127.0.0.1", "allow_anonymous false", f"password_file {folder / 'passwords'}")
    (folder / "conf").write_text("\n".join([*lines, "user root", "log_dest none", ""]))
    process = subprocess.Popen([mosquitto, "-c", folder / "conf"])
    url = f"mqtt://127.0.0.1:{port}"
    deadline = time.monotonic() + 60
    while True:
        try:
            broker = credentials.complete(
                address.parse(url), None, {credentials.USER: USER, credentials.PASSWORD: PASSWORD}
            )
            with Session(broker, "probe") as session:
                session.connect(5)
                break
        except BrokerUnreachable:
            assert time.monotonic() < deadline
    yield url
    process.kill()
    process.wait(5)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "credentials.toml", PASSWORD)


def write(path: Path, password: str) -> Path:
    path.touch(mode=0o600)
    path.write_text(f"user = {json.dumps(USER)}\npassword = {json.dumps(password)}\n")
    return path


def status(*arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    """`edge-runtime status` of a fleet that is not there: exit code 3 and "no fleet" once the broker let it in."""
    command = [sys.executable, "-m", "edge_runtime.cli", "status", "--fleet", "none", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables})


def assert_silent(text: str) -> None:
    assert not any(form in text for form in FORMS), text


def test_a_password_comes_from_a_file_the_environment_or_the_url(closed_broker: str, file: Path) -> None:
    url = closed_broker.replace("//", f"//{quote(USER)}:{quote(PASSWORD, safe='')}@")
    variables = {credentials.USER: USER, credentials.PASSWORD: PASSWORD}
    for answer, shown in (
        (status("--broker", closed_broker, "--credentials", str(file)), "dev%20ice:***@"),
        (status("--broker", closed_broker, **variables), "dev%20ice:***@"),
        (status("--broker", url), "dev%20ice:***@"),
    ):
        assert answer.returncode == 3 and "no fleet is announced" in answer.stderr and shown in answer.stderr
        assert_silent(answer.stdout + answer.stderr)
    assert "use --credentials FILE" in answer.stderr  # of the URL alone


def test_a_wrong_password_is_said_and_not_shown(closed_broker: str, tmp_path: Path) -> None:
    file = write(tmp_path / "wrong.toml", "hunter2")
    for answer in (
        status("--broker", closed_broker, "--credentials", str(file)),
        status("--broker", closed_broker),
    ):
        assert answer.returncode == 3 and len(answer.stderr.splitlines()) == 1
        assert "refused the connection" in answer.stderr and "hunter2" not in answer.stderr


@pytest.mark.parametrize(
    ("place", "code"), [("127.0.0.1:9", 3), ("127.0.0.1:notaport", 2), ("h:1?pass=x", 2), ("h:1/x", 2)]
)
def test_no_error_of_an_address_shows_its_password(place: str, code: int) -> None:
    for password in ("hunter2", "hunter2%2F"):
        answer = status("--broker", f"mqtt://me:{password}@{place}")
        assert answer.returncode == code and "me:***@" in answer.stderr
        assert "hunter2" not in answer.stdout + answer.stderr and "Traceback" not in answer.stderr


def test_a_file_open_to_others_is_refused(file: Path) -> None:
    file.chmod(0o644)
    answer = status("--credentials", str(file))
    assert answer.returncode == 2 and f"chmod 600 {file}" in answer.stderr
    assert_silent(answer.stderr)


def test_the_password_of_a_fleet_is_nowhere_but_in_its_file(
    closed_broker: str, fleet: Fleet, file: Path, real_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A round from both ends; then all that was printed, logged, kept, or given to a process is searched."""
    fleet.broker = type("Closed", (), {"url": closed_broker})()  # type: ignore[assignment]
    fleet.write((real_model, 2))
    node = fleet.node("--credentials", str(file), "--until-finished")
    node.phase("collecting")
    monkeypatch.setenv(credentials.USER, USER)
    monkeypatch.setenv(credentials.PASSWORD, PASSWORD)
    device = fleet.agent("a", "--until-finished")
    arguments: list[str] = []

    def look(command: Command) -> None:
        """At the arguments and variables of every process that the command has started, and at its state."""
        parent = psutil.Process(command.process.pid)
        for child in parent.children(recursive=True):
            try:
                line = child.cmdline()
                if line == parent.cmdline():  # a copy of its parent, until it becomes a program of its own
                    continue
                arguments.extend([*line, json.dumps(child.environ(), ensure_ascii=False)])
            except psutil.Error:  # it has ended meanwhile
                continue
        for path in filter(Path.is_file, fleet.folder.rglob("*")):
            if path != file:
                try:
                    content = path.read_bytes()
                except FileNotFoundError:
                    continue
                assert not any(form.encode() in content for form in FORMS), path

    def finished(event: dict) -> bool:
        look(device)
        return event["phase"] == "finished"

    device.until(finished, 240)
    node.phase("finished")
    assert (device.end(), node.end()) == (0, 0)
    assert any("edge_runtime.trainer" in argument for argument in arguments)  # it was looked at in time
    assert_silent("".join(arguments))
    assert_silent(json.dumps([*node.seen, *device.seen], ensure_ascii=False) + node.error() + device.error())
    (connected,) = (event for event in device.seen if event["phase"] == "connected")
    assert connected["text"] == closed_broker.replace("//", "//dev%20ice:***@")
