"""Runs the user's command for the newest version in an agent's state, once until it has succeeded.

    python -m edge_runtime.agent.on_version STATE TIMEOUT_S COMMAND...

    STATE/on-version/VERSION    copy of the version's folder; stays until a later command begins
    STATE/on-version.log        what the command printed
    STATE/on-version.done       the last version for which the command has succeeded

One process at a time runs a command, and others wait for it. A process goes on when its agent is
killed; where it is killed too, the next agent starts another one for the same version.
"""

import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from edge_broker import files
from filelock import FileLock

from edge_runtime.state import NEWEST, stamp, version_of


def run(state: Path, timeout_s: float, command: list[str]) -> str:
    """Run the command, if it has not succeeded for the newest version.

    Returns:
        A sentence for the device's screen; empty: nothing ran.

    Raises:
        OSError: the version cannot be copied, or the command is not there.
    """
    adapter, copies, done = state / NEWEST, state / "on-version", state / "on-version.done"
    with FileLock(state / "on-version.lock"):
        seen, version = stamp(adapter), version_of(adapter)
        # version 0 is the base alone
        if not version or (done.exists() and done.read_text() == str(version)):
            return ""
        folder = copies / str(version)
        shutil.rmtree(copies, ignore_errors=True)
        if not _copied(adapter, folder, seen):
            return ""  # a newer version took the place of this one, and its process comes
        variables = {"EDGE_RUNTIME_VERSION": str(version), "EDGE_RUNTIME_ADAPTER": str(folder)}
        failure = _failure([*command, str(folder)], variables, state / "on-version.log", timeout_s)
        if failure:
            return f"--on-version {failure} for version {version}; see {state / 'on-version.log'}"
        fresh = done.with_suffix(".part")
        fresh.write_text(str(version))
        files.put(fresh, done)
    return f"--on-version has run for version {version}"


def _copied(adapter: Path, folder: Path, seen: tuple[int, int]) -> bool:
    """Copy the adapter's folder; False: another one took its place meanwhile."""
    try:
        shutil.copytree(adapter, folder)
    except OSError:
        if stamp(adapter) == seen:
            raise
    return stamp(adapter) == seen


def _failure(command: list[str], variables: dict[str, str], log: Path, timeout_s: float) -> str:
    """Run a command with further variables of its environment; why it failed, or empty text."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=os.environ | variables,
            start_new_session=True,
        )
    try:
        code = process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        # with what it has started
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return f"took longer than {timeout_s:g} s and was ended"
    return f"ended with exit code {code}" if code else ""


if __name__ == "__main__":
    try:
        text = run(Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3:])
    except OSError as error:
        text = f"--on-version could not run: {error}"
    # the agent may have ended
    with suppress(OSError):
        os.write(1, text.encode(errors="replace"))
