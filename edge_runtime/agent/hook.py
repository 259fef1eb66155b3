"""A command of the user that runs after each new version, with the folder of what was learned.

    COMMAND STATE/on-version/VERSION
    EDGE_RUNTIME_VERSION, EDGE_RUNTIME_ADAPTER    version and folder, as the command's environment

The folder is a copy that stays as it is until the next version's command begins. Commands run one
after another in a thread; of versions that come meanwhile, the newest alone is told. A command
that fails, or takes longer than TIMEOUT_S, is told and changes nothing else.
"""

import logging
import os
import shlex
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec
from edge_broker import credentials

from edge_runtime.errors import InputError

log = logging.getLogger(__name__)
TIMEOUT_S = 600.0


def words(command: str) -> tuple[str, ...]:
    """The words of a command, quoted as in a shell; no shell runs it.

    Raises:
        InputError: there are none, a quote is open, or there is no such program.
    """
    try:
        split = tuple(shlex.split(command))
    except ValueError as error:
        raise InputError(f"--on-version is {command!r}, which is no command: {error}") from error
    if not split or shutil.which(split[0]) is None:
        raise InputError(f"--on-version is {command!r}, but there is no such program: give its path")
    return split


class HookEnded(msgspec.Struct, frozen=True):
    """A command has ended, or could not run."""

    version: int
    text: str  # a sentence for this device's screen


class Hook:
    """Runs the command; used from the agent's thread."""

    def __init__(
        self,
        command: tuple[str, ...],
        adapter: Path,
        state: Path,
        post: Callable[[HookEnded], None],
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        """Nothing runs yet.

        Args:
            command: its words.
            adapter: folder of the newest version.
            state: for the copy, and for what the command prints.
            post: takes the end of each command, in another thread.
            timeout_s: after which a command is killed.
        """
        self._command, self._adapter, self._post = command, adapter, post
        self._copies, self._output, self._timeout_s = (
            state / "on-version",
            state / "on-version.log",
            timeout_s,
        )
        self._newest: int | None = None  # version that waits for the thread
        self._changed, self._running = threading.Lock(), False

    def run(self, version: int) -> None:
        """Run the command for a version, at once or after the one that runs."""
        with self._changed:
            self._newest = version
            if not self._running:
                self._running = True
                threading.Thread(target=self._work, name="on-version", daemon=True).start()

    def _work(self) -> None:
        while True:
            with self._changed:
                version, self._newest = self._newest, None
                if version is None:
                    self._running = False
                    return
            try:
                text = self._once(version)
            # a folder that cannot be copied, a command that is not there
            except OSError as error:
                text = f"--on-version could not run: {error}"
            if text:
                log.warning("version %s: %s", version, text)
            self._post(HookEnded(version, text or f"--on-version has run for version {version}"))

    def _once(self, version: int) -> str:
        """Run the command for one version; what went wrong, or empty text."""
        folder = self._copies / str(version)
        shutil.rmtree(self._copies, ignore_errors=True)
        shutil.copytree(self._adapter, folder)
        environment = credentials.withhold(os.environ)
        environment |= {"EDGE_RUNTIME_VERSION": str(version), "EDGE_RUNTIME_ADAPTER": str(folder)}
        with self._output.open("wb") as output:
            process = subprocess.Popen(
                [*self._command, str(folder)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                start_new_session=True,
            )
        try:
            code = process.wait(self._timeout_s)
        except subprocess.TimeoutExpired:
            # with what it has started
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"--on-version took longer than {self._timeout_s:g} s and was ended; see {self._output}"
        return f"--on-version ended with exit code {code}; see {self._output}" if code else ""
