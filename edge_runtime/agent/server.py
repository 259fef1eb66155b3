"""The server process beside an agent: it answers with the newest version, and takes newer ones itself.

    stopped ─> running ─> ended ─> (after a delay that doubles with each failure) running

The server reads the state's adapter folder and follows it (serving/follow.py), so the agent only
starts it, and starts it anew where a plan needs another base. No round waits for the server.
"""

import math
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from edge_runtime.agent.options import DeviceOptions, ServeOptions
from edge_runtime.planning.processes import environment
from edge_runtime.serving.event import ServerEvent
from edge_runtime.settings import Backend

FIRST_DELAY_S, LONGEST_DELAY_S = 1.0, 60.0
SOUND_S = 60.0  # a server that ran for so long starts again after the first delay
STOP_S = 25.0  # for answers that are being written, longer than the server itself waits


class BaseChoice(msgspec.Struct, frozen=True):
    """The base that a server loads."""

    source: str  # as the catalog names it
    depth: int
    weights: str
    backend: Backend = "torch"


class ServerEnded(msgspec.Struct, frozen=True):
    """A server process has ended."""

    pid: int | None  # None: there was no process, as it could not start
    reason: str  # a sentence for this device's screen


class Server:
    """Keeps a server process running; used from the agent's thread."""

    def __init__(
        self,
        options: DeviceOptions,
        serve: ServeOptions,
        folder: Path,
        post: Callable[[ServerEvent | ServerEnded], None],
    ) -> None:
        """Nothing runs yet.

        Args:
            options: of the agent.
            serve: where the server listens, and how much it may hold.
            folder: of the newest version.
            post: takes the server's events, in another thread.
        """
        self._options, self._serve, self._folder, self._post = options, serve, folder, post
        self._base: BaseChoice | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._started = self._due = 0.0
        self._delay_s, self._replaced = FIRST_DELAY_S / 2, False

    def start(self, base: BaseChoice) -> None:
        """Answer with this base from now on; the folder holds a version for it."""
        if base == self._base:
            return
        self._base = base
        if self._process is None:
            self._run()
        else:  # the next one starts when this one has answered what it was asked
            self._process.terminate()
            self._replaced = True

    def tick(self) -> float:
        """Start an ended server again if that is due; seconds until the next call is of use."""
        if self._base is None or self._process is not None:
            return math.inf
        if self._due <= time.monotonic():
            self._run()
            return math.inf
        return self._due - time.monotonic()

    def ended(self, event: ServerEnded) -> str | None:
        """Take in the end of a process; what to tell of it, or None if it was to end."""
        running = None if self._process is None else self._process.pid
        if self._base is None or running != event.pid:
            return None
        self._process = None
        if self._replaced:
            self._due, self._replaced = 0.0, False
            return "the server starts again with another base"
        sound = time.monotonic() - self._started > SOUND_S
        self._delay_s = FIRST_DELAY_S if sound else min(2 * self._delay_s, LONGEST_DELAY_S)
        self._due = time.monotonic() + self._delay_s
        return f"{event.reason}; it starts again in {self._delay_s:g} s"

    def stop(self) -> None:
        """End the process, if one runs, and wait for its end."""
        process, self._process, self._base = self._process, None, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _run(self) -> None:
        assert self._base is not None
        options, serve = self._options, self._serve
        command = [sys.executable, "-m", "edge_runtime.cli", "serve", "--attended", "--json"]
        command += ["--model", self._base.source, "--models", str(options.models)]
        command += ["--adapter", str(self._folder), "--weights", self._base.weights]
        command += ["--backend", self._base.backend]
        command += ["--device", options.device, "--threads", str(options.threads)]
        command += ["--host", serve.endpoint.host, "--port", str(serve.endpoint.port)]
        command += ["--context", str(serve.size.context), "--parallel", str(serve.size.parallel)]
        errors, self._started = options.state / "server.log", time.monotonic()
        try:
            with errors.open("wb") as log:
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment()
                )
        # the disk is full, or there is no memory for a process
        except OSError as error:
            self._due = math.inf  # until the event is taken in
            self._post(ServerEnded(None, f"the server could not start: {error}"))
            return
        arguments = (self._process, errors, self._post)
        threading.Thread(target=_read, args=arguments, name="server", daemon=True).start()


def _read(
    process: subprocess.Popen[bytes], errors: Path, post: Callable[[ServerEvent | ServerEnded], None]
) -> None:
    """Post each line of a server, and its end."""
    assert process.stdout is not None
    for line in process.stdout:
        try:
            post(msgspec.json.decode(line, type=ServerEvent))
        # a library printed the line
        except (msgspec.DecodeError, UnicodeDecodeError):
            continue
    code = process.wait()
    lines = errors.read_text(errors="replace").strip().splitlines() if errors.exists() else []
    words = f": {lines[-1]}" if lines else ""
    post(ServerEnded(process.pid, f"the server ended with exit code {code}{words}"))
