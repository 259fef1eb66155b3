"""A command of the user that runs after each new version, with a folder of what was learned.

    COMMAND STATE/on-version/VERSION
    EDGE_RUNTIME_VERSION, EDGE_RUNTIME_ADAPTER    version and folder, as the command's environment

A process of its own runs the command (on_version.py), so that a command ends in order when the
agent is killed. A command that fails, or takes longer than TIMEOUT_S, is told and changes nothing
else.
"""

import os
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
from edge_broker import credentials

from edge_runtime.errors import InputError

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

    text: str  # a sentence for this device's screen


class Hook:
    """Has the command run; used from the agent's thread."""

    def __init__(
        self,
        command: tuple[str, ...],
        state: Path,
        post: Callable[[HookEnded], None],
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        """Nothing runs yet.

        Args:
            command: its words.
            state: the agent's, with the newest version.
            post: takes the end of each command, in another thread.
            timeout_s: after which a command is killed.
        """
        module = "edge_runtime.agent.on_version"
        self._process = [sys.executable, "-m", module, str(state), str(timeout_s), *command]
        self._post = post
        self._changed, self._running, self._due = threading.Lock(), False, False

    def run(self) -> None:
        """Run the command for the newest version, at once or after the command that runs."""
        with self._changed:
            self._due = True
            if not self._running:
                self._running = True
                threading.Thread(target=self._work, name="on-version", daemon=True).start()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._running, self._due = self._due, False
                if not self._running:
                    return
            try:
                ended = subprocess.run(
                    self._process,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    env=credentials.withhold(os.environ),
                    start_new_session=True,
                )
                text = ended.stdout.decode(errors="replace")
            # there is no memory for a process
            except OSError as error:
                text = f"--on-version could not run: {error}"
            if text:
                self._post(HookEnded(text))
