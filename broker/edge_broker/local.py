"""A broker on this machine: Mosquitto where it is installed, else rumqttd of `iotcore`.

It is for trials and tests; the README tells how to set up a fleet's broker. It listens on loopback
only, because anyone who reaches it may connect without a password. A small watching process
(`python -m edge_broker.local`) ends the broker when its stdin closes: when the owner stops the
broker, exits, or is killed. The broker's state is in memory; transfers survive its loss.
"""

import contextlib
import ctypes
import importlib.util
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from edge_broker.errors import BrokerError, BrokerUnreachable

_HOST = "127.0.0.1"
_ATTEMPTS = 3  # to find a free port, which another process may take before the broker does
_START_S = 60.0  # for an answer to CONNECT; a broker that ends is noticed at once
_STOP_S = 5.0  # before a broker that does not end is killed

# max_queued_messages: more chunks than a node grants at once. sys_interval: $SYS topics would wake
# the broker. user: Mosquitto that root starts would switch to a user who may not read the folder.
_MOSQUITTO = """\
listener {port} {host}
allow_anonymous true
persistence false
max_packet_size 1048576
max_queued_messages 4096
set_tcp_nodelay true
sys_interval 0
log_dest stderr
log_type error
log_type warning
log_type notice
user root
"""

# rumqttd keeps a log of messages for each filter. Segment size x count is the memory of a filter, and
# the distance that a slow reader may lag behind.
_RUMQTTD = """\
id = 0
[router]
id = 0
max_connections = 1000
max_outgoing_packet_count = 200
max_segment_size = 8388608
max_segment_count = 4
[v5.1]
name = "mqtt5"
listen = "{host}:{port}"
next_connection_delay_ms = 1
[v5.1.connections]
connection_timeout_ms = 60000
max_payload_size = 1048576
max_inflight_count = 100
dynamic_filters = true
"""

log = logging.getLogger(__name__)


class Broker:
    """A running broker; stop it, or use it as a context manager."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, kind: str, log_file: Path) -> None:
        self.port, self.url = port, f"mqtt://{_HOST}:{port}"
        self.kind = kind  # mosquitto or embedded
        self.log = log_file
        self._process = process

    def stop(self) -> None:
        """End the broker and wait until it is gone; safe to call twice."""
        assert self._process.stdin
        self._process.stdin.close()
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(_STOP_S)

    def __enter__(self) -> "Broker":
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()


def start_broker(port: int = 0, *, state_dir: Path, kind: str = "auto") -> Broker:
    """Start a broker and wait until it answers an MQTT 5 CONNECT.

    Args:
        port: 0 takes a free one.
        state_dir: for the configuration and the log.
        kind: mosquitto, embedded, or auto: Mosquitto if it is installed.

    Raises:
        BrokerError: no such broker is installed, the port is taken, or the broker did not start;
            the message ends with the last lines of its log.
    """
    program = None if kind == "embedded" else find_mosquitto()
    if kind not in ("auto", "mosquitto", "embedded"):
        raise BrokerError(f"the kind of broker is {kind!r}; it needs to be auto, mosquitto or embedded")
    if kind == "mosquitto" and not program:
        raise BrokerError(
            "mosquitto is neither on PATH nor in /usr/sbin or /usr/local/sbin; install it or use the embedded one"
        )
    if not program and not importlib.util.find_spec("iotcore"):
        raise BrokerError(
            "no broker is installed here: install mosquitto, or in a clone of Edge Runtime run `pip install '.[broker]'`"
        )
    state_dir.mkdir(parents=True, exist_ok=True)
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return _start(free_port(port), state_dir, program)
        except BrokerError as error:
            if port or attempt == _ATTEMPTS or "in use" not in str(error):
                raise
    raise AssertionError("unreachable")


def find_mosquitto() -> str | None:
    """The path of an installed Mosquitto, also in folders that only root has on PATH."""
    return shutil.which(
        "mosquitto", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])
    )


def _start(port: int, state_dir: Path, program: str | None) -> Broker:
    kind = "mosquitto" if program else "embedded"
    config = state_dir / ("mosquitto.conf" if program else "rumqttd.toml")
    config.write_text((_MOSQUITTO if program else _RUMQTTD).format(port=port, host=_HOST))
    log_file = state_dir / "broker.log"
    # The watching process must find this package however the owner found it.
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    with log_file.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "edge_broker.local", str(config), *filter(None, [program])],
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=out,
            env=os.environ | {"PYTHONPATH": path},
        )
    broker = Broker(process, port, kind, log_file)
    try:
        _await_answer(process, broker.url)
    except BaseException as error:
        broker.stop()
        if not isinstance(error, BrokerError):
            raise
        tail = "\n".join(log_file.read_text(errors="replace").splitlines()[-10:])
        raise BrokerError(
            f"the {kind} broker on {_HOST}:{port} did not start: {error}; its log {log_file} ends:\n{tail}"
        ) from None
    log.info("%s broker on %s:%d, log in %s", kind, _HOST, port, log_file)
    return broker


def _await_answer(process: subprocess.Popen[bytes], url: str) -> None:
    from edge_broker.session import Session  # here, because the watching process needs none

    deadline = time.monotonic() + _START_S
    while (left_s := deadline - time.monotonic()) > 0:
        with contextlib.suppress(BrokerUnreachable), Session(url, "start", session_expiry_s=0) as session:
            session.connect(left_s)
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            raise BrokerError(f"it ended with status {process.wait(timeout=0.02)}")
    raise BrokerError(f"no answer to an MQTT CONNECT within {_START_S:g} s")


def free_port(port: int = 0) -> int:
    """The given port of loopback, or any free port for 0; BrokerError if the port is taken."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As brokers do: a port in TIME_WAIT is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_HOST, port))
        except OSError as error:
            hint = "stop what runs there or use another port"
            raise BrokerError(f"cannot listen on {_HOST}:{port}: {error.strerror}; {hint}") from None
        return int(probe.getsockname()[1])


# --- the watching process


def _watch(config: str, program: str | None = None) -> None:
    # Ctrl-C reaches the whole process group; the owner decides when the broker ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if program:
        child = subprocess.Popen(
            [program, "-c", config], stdin=subprocess.DEVNULL, preexec_fn=_die_with_parent
        )
        threading.Thread(target=_until_stdin_closes, args=(child.terminate,), daemon=True).start()
        sys.exit(child.wait())
    threading.Thread(target=_until_stdin_closes, args=(lambda: os._exit(0),), daemon=True).start()
    from iotcore.iotcore import IotCoreBroker

    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # it reports every packet as an error
    logging.getLogger("rumqttd").setLevel(logging.CRITICAL)
    IotCoreBroker(config_path=config).run_forever()
    sys.exit(1)  # it only returns when it cannot listen


def _until_stdin_closes(then: Callable[[], object]) -> None:
    # not through sys.stdin, whose lock a blocked reader would hold at exit
    while os.read(0, 4096):
        pass
    then()


def _die_with_parent() -> None:
    """Let Linux end the broker when the watching process is killed (prctl PR_SET_PDEATHSIG)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


if __name__ == "__main__":
    _watch(*sys.argv[1:])
