"""Brokers on this machine: they start, say why they do not, and never stay behind."""

import os
import signal
import socket
import time
from pathlib import Path

import pytest
from edge_broker import local
from edge_broker.errors import BrokerError
from edge_broker.session import Session

OWNER = """
import sys
from pathlib import Path
from edge_broker.local import start_broker
broker = start_broker(state_dir=Path(sys.argv[1]), kind=sys.argv[2])
print(broker.port, flush=True)
sys.stdin.read()
"""


def wait_until_free(port, timeout_s=60.0):
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except OSError:
            return
        assert time.monotonic() < deadline, f"something still listens on {port}"


def test_it_is_of_the_kind_asked_for(broker):
    assert broker.kind in ("mosquitto", "embedded") and broker.url == f"mqtt://127.0.0.1:{broker.port}"
    assert broker.log.exists()


def test_stop_frees_the_port_and_it_can_start_there_again(broker, tmp_path):
    with local.start_broker(state_dir=tmp_path, kind=broker.kind) as first:
        pass
    first.stop()
    wait_until_free(first.port)
    again = local.start_broker(first.port, state_dir=tmp_path, kind=broker.kind)
    with again, Session(again.url, "a") as session:
        session.connect(60)
    wait_until_free(first.port)


def test_a_taken_port_is_said(broker, tmp_path):
    with pytest.raises(
        BrokerError, match=rf"cannot listen on 127\.0\.0\.1:{broker.port}: Address already in use"
    ):
        local.start_broker(broker.port, state_dir=tmp_path)


def test_what_the_log_says_is_in_the_error(broker, tmp_path, monkeypatch):
    monkeypatch.setattr(local, "_MOSQUITTO", local._MOSQUITTO + "nonsense true\n")
    monkeypatch.setattr(local, "_RUMQTTD", "nonsense")
    with pytest.raises(
        BrokerError,
        match=r"(?s)did not start: it ended with status [13]; its log .* ends:\n.*(onsense|toml|TOML)",
    ):
        local.start_broker(state_dir=tmp_path, kind=broker.kind)


def test_an_unknown_kind_is_refused(tmp_path):
    with pytest.raises(BrokerError, match="the kind of broker is 'emqx'"):
        local.start_broker(state_dir=tmp_path, kind="emqx")


def test_it_ends_when_its_owner_is_killed(broker, child, tmp_path):
    owner = child(OWNER, tmp_path, broker.kind)
    port = int(owner.stdout.readline())
    os.kill(owner.pid, signal.SIGKILL)
    wait_until_free(port)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the watcher through /proc")
def test_it_ends_when_its_watcher_is_killed(broker, tmp_path):
    with local.start_broker(state_dir=tmp_path, kind=broker.kind) as second:
        os.kill(second._process.pid, signal.SIGKILL)
        wait_until_free(second.port)
