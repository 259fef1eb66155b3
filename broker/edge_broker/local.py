"""A broker on this machine: Mosquitto where it is installed, else the embedded rumqttd of `iotcore`.

For one machine, for trying out and for tests; a fleet has its own broker (see the README). The broker runs under a
small watching process (`python -m edge_broker.local`), which ends it as soon as its own stdin closes: when the owner
stops it, exits, or is killed. State is in memory only; the transfers are made to survive that.
"""

import atexit
import contextlib
import ctypes
import importlib.util
import ipaddress
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from edge_broker.errors import BrokerError

MAX_PACKET_BYTES = 1 << 20
_ATTEMPTS = 3  # for a port of our choice, which another process may take before the broker does
_STOP_S = 5.0

# Queued messages: 4096 chunks are more than a node ever grants at once. No $SYS topics: they wake the broker every 10 s
# for nobody.
_MOSQUITTO = """\
listener {port} {host}
allow_anonymous true
persistence false
max_packet_size {max_packet_bytes}
max_queued_messages 4096
set_tcp_nodelay true
sys_interval 0
log_dest stderr
log_type error
log_type warning
log_type notice
user {user}
"""

# rumqttd keeps a log of messages for each filter: segment size x count is its memory a filter, and what a slow reader
# may lag behind.
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
max_payload_size = {max_packet_bytes}
max_inflight_count = 100
dynamic_filters = true
"""

log = logging.getLogger(__name__)


class Broker:
    """A running broker: its url, kind (mosquitto or embedded) and log file; stop it, or use it as a context manager."""

    def __init__(
        self, process: subprocess.Popen[bytes], host: str, port: int, kind: str, log_file: Path
    ) -> None:
        self.host, self.port, self.kind, self.log = host, port, kind, log_file
        self.url = f"mqtt://{f'[{host}]' if ':' in host else host}:{port}"
        self._process = process
        atexit.register(self.stop)

    def stop(self) -> None:
        """End the broker and wait until it is gone; safe to call twice."""
        atexit.unregister(self.stop)
        _end(self._process)

    def __enter__(self) -> "Broker":
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()


def start_broker(
    port: int = 0,
    host: str = "127.0.0.1",
    *,
    state_dir: Path,
    kind: str = "auto",
    open_to_network: bool = False,
    timeout_s: float = 10.0,
) -> Broker:
    """Start a broker and wait until it answers an MQTT 5 CONNECT.

    Args:
        port: 0 takes a free one.
        host: the address to listen on; anyone who reaches it may connect without a password.
        state_dir: for its configuration and its log.
        kind: mosquitto, embedded, or auto: Mosquitto if it is installed.
        open_to_network: allow a host that is not this machine's loopback.
        timeout_s: how long to wait for the answer.

    Raises:
        BrokerError: the host is not loopback, no such broker is installed, the port is taken, or the broker did not
            start; then with the last lines of its log.
    """
    if not open_to_network and not _is_loopback(host):
        raise BrokerError(
            f"a broker on {host} would let anyone on the network in without a password; use 127.0.0.1, "
            "allow it explicitly, or set up a broker with TLS and access rules"
        )
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
            return _start(_free_port(host, port), host, state_dir, program, timeout_s)
        except BrokerError as error:
            if port or attempt == _ATTEMPTS or "in use" not in str(error):
                raise
    raise AssertionError("unreachable")


def find_mosquitto() -> str | None:
    """The path of an installed Mosquitto; distributions put it where only root's PATH leads."""
    return shutil.which(
        "mosquitto", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])
    )


def _start(port: int, host: str, state_dir: Path, program: str | None, timeout_s: float) -> Broker:
    kind = "mosquitto" if program else "embedded"
    config = state_dir / ("mosquitto.conf" if program else "rumqttd.toml")
    fields = {"port": port, "host": host, "max_packet_bytes": MAX_PACKET_BYTES, "user": _user()}
    config.write_text((_MOSQUITTO if program else _RUMQTTD).format(**fields))
    job = {"command": [program, "-c", str(config)]} if program else {"rumqttd": str(config)}
    log_file = state_dir / "broker.log"
    # The watcher must find this package however the owner found it.
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    with log_file.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "edge_broker.local", json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=out,
            env=os.environ | {"PYTHONPATH": path},
        )
    try:
        _await_answer(process, host, port, time.monotonic() + timeout_s)
    except BrokerError as error:
        _end(process)
        tail = "\n".join(log_file.read_text(errors="replace").splitlines()[-10:])
        raise BrokerError(
            f"the {kind} broker on {host}:{port} did not start: {error}; its log {log_file} ends:\n{tail}"
        ) from None
    except BaseException:
        _end(process)
        raise
    log.info("%s broker on %s:%d, log in %s", kind, host, port, log_file)
    return Broker(process, host, port, kind, log_file)


def _await_answer(process: subprocess.Popen[bytes], host: str, port: int, deadline: float) -> None:
    error: object = "no time"
    while (left := deadline - time.monotonic()) > 0:
        try:
            _shake_hands(host, port, left)
            return
        except OSError as failure:
            error = failure
        with contextlib.suppress(subprocess.TimeoutExpired):
            raise BrokerError(f"it ended with status {process.wait(timeout=0.02)}")
    raise BrokerError(f"no answer to an MQTT CONNECT in time ({error})")


def _shake_hands(host: str, port: int, timeout_s: float) -> None:
    """An MQTT 5 CONNECT with an empty client id, and DISCONNECT after the broker's CONNACK."""
    body = b"\0\4MQTT\5\2\0\5\0\0\0"  # protocol, clean start, keep-alive 5 s, no properties, no client id
    with socket.create_connection((host, port), timeout=timeout_s) as link:
        link.sendall(bytes([0x10, len(body)]) + body)
        answer = link.recv(4)
        if len(answer) < 4 or answer[0] != 0x20 or answer[3] != 0:
            raise ConnectionError(f"it answered CONNECT with {answer.hex() or 'nothing'}")
        link.sendall(b"\xe0\0")


def _free_port(host: str, port: int) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
        )  # as brokers do: a port in TIME_WAIT is free
        try:
            probe.bind((host, port))
        except OSError as error:
            raise BrokerError(
                f"cannot listen on {host}:{port}: {error.strerror}; stop what runs there or use another port"
            ) from None
        return int(probe.getsockname()[1])


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _user() -> str:
    """Started by root, Mosquitto becomes user `mosquitto`, who may not read our folder; else this changes nothing."""
    import pwd

    return pwd.getpwuid(os.getuid()).pw_name


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.stdin:
        process.stdin.close()
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(_STOP_S)


# --- the watching process


def _watch(job: dict[str, Any]) -> None:
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches the whole group; the owner decides when the broker ends
    if "rumqttd" in job:
        threading.Thread(target=_until_stdin_closes, args=(lambda: os._exit(0),), daemon=True).start()
        from iotcore.iotcore import IotCoreBroker

        logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        logging.getLogger("rumqttd").setLevel(logging.CRITICAL)  # it reports every packet as an error
        IotCoreBroker(config_path=job["rumqttd"]).run_forever()
        sys.exit(1)  # it only returns when it cannot listen
    child = subprocess.Popen(job["command"], stdin=subprocess.DEVNULL, preexec_fn=_die_with_parent)
    threading.Thread(target=_until_stdin_closes, args=(child.terminate,), daemon=True).start()
    sys.exit(child.wait())


def _until_stdin_closes(then: Any) -> None:
    while os.read(0, 4096):  # not through sys.stdin, whose lock a blocked reader would hold at exit
        pass
    then()


def _die_with_parent() -> None:
    """Should the watcher itself be killed: Linux then ends the broker too (prctl PR_SET_PDEATHSIG)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


if __name__ == "__main__":
    _watch(json.loads(sys.argv[1]))
