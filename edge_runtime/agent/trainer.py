"""A trainer process, watched: its progress and its end are events on the agent's one queue."""

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import msgspec

from edge_runtime.agent.local_round import write_job
from edge_runtime.errors import DiskError, InputError, MemoryShortError, TrainerError
from edge_runtime.planning.processes import environment
from edge_runtime.protocol.report import Cause
from edge_runtime.trainer.job import Job, Progress

KILLED = -9  # exit code of a process that the system killed, most likely for memory
TIMED_OUT = 124  # exit code, as `timeout` has it
CAUSES: dict[int, Cause] = {  # of exit codes; any other is "trainer"
    KILLED: "memory",
    MemoryShortError.exit_code: "memory",
    DiskError.exit_code: "disk",
    TIMED_OUT: "time",
}
# Exit codes behind a sentence of our own; the last line of a crash may quote a row.
SENTENCES = {error.exit_code for error in (InputError, TrainerError, MemoryShortError, DiskError)}


class Ended(msgspec.Struct, frozen=True):
    """A trainer process has ended."""

    pid: int
    exit_code: int  # negative: killed by this signal
    reason: str  # a sentence for this device's screen


class Running(Protocol):
    """A trainer at work."""

    pid: int

    def stop(self) -> None:
        """End it, and wait for its end."""


class Trainer:
    """One running job. The process watches its standard input, and so ends with the agent."""

    def __init__(self, job: Job, folder: Path, post: Callable[[Progress | Ended], None]) -> None:
        """Write the job into the folder and start it; post is called from another thread."""
        write_job(folder, job)
        self._post, self._errors = post, folder / "stderr.log"
        self._timeout_s, self._late = job.fleet.training.timeout_s, False
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "edge_runtime.trainer", str(folder), "--attended"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment(),
            )
        self.pid = self._process.pid
        self._timer = threading.Timer(self._timeout_s, self._expire)
        self._timer.daemon = True
        self._timer.start()
        # after the timer, which the thread cancels when the process has ended, however soon
        self._watch = threading.Thread(target=self._read, name="trainer", daemon=True)
        self._watch.start()

    def stop(self) -> None:
        """Kill the process, if it still runs, and wait for its end."""
        self._process.kill()
        self._watch.join(10)

    def _expire(self) -> None:
        self._late = True
        self._process.kill()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                self._post(msgspec.json.decode(line, type=Progress))
            except (msgspec.DecodeError, UnicodeDecodeError):
                # a library printed the line
                continue
        code = self._process.wait()
        self._timer.cancel()
        if self._late:
            code, reason = TIMED_OUT, f"the trainer took longer than {self._timeout_s:g} s"
        else:
            reason = self._reason(code)
        self._post(Ended(self.pid, code, reason))

    def _reason(self, code: int) -> str:
        ended = f"the trainer ended with exit code {code}"
        if code not in SENTENCES:
            return f"{ended}; its last words are in {self._errors}"
        try:
            lines = self._errors.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        except OSError as error:
            return f"{ended}, and its last words cannot be read: {error}"
        return lines[-1] if lines else ended
