"""Commands as real processes whose events are read as they come, and one test's fleet of them."""

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from edge_broker.local import Broker

FLEET = """
[fleet]
name = "{name}"
open = true
rounds = {rounds}
quorum = {quorum}
deadline_s = {deadline_s}
extensions = {extensions}

[method]
name = "{method}"

[adapter]
rank = 2

[training]
steps = {steps}
rows_a_step = 4
learning_rate = 1e-2
max_tokens = 32
"""
MODEL = """
[[catalog]]
source = "{source}"
depth = {depth}
weights = ["float32"]
"""


class Patience:
    """Seconds to wait for something; as many again for as long as processes of this test work.

    A busy machine makes every process slower. A fault leaves them idle, or takes TIMES as long.
    """

    TIMES, WORK_S = 8, 0.5  # most extensions; CPU seconds in all, from which processes count as working

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s, self._extensions = timeout_s, self.TIMES
        self._until, self._before = time.monotonic() + timeout_s, _cpu_seconds()

    def left_s(self) -> float:
        """Seconds until the next look at the processes; 0: the wait is over."""
        left_s = self._until - time.monotonic()
        if left_s > 0:
            return left_s
        now = _cpu_seconds()
        worked_s = sum(seconds - self._before.get(pid, 0.0) for pid, seconds in now.items())
        if worked_s < self.WORK_S or not self._extensions:
            return 0.0
        self._before, self._extensions = now, self._extensions - 1
        self._until = time.monotonic() + self._timeout_s
        return self._timeout_s


def _cpu_seconds() -> dict[int, float]:
    """CPU time of every process below this one."""
    seconds = {}
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            seconds[process.pid] = sum(process.cpu_times()[:2])
    return seconds


def eventually(holds: Callable[[], bool], timeout_s: float = 20.0) -> bool:
    """Whether it holds in time."""
    patience = Patience(timeout_s)
    while not holds():
        if not patience.left_s():
            return False
        os.sched_yield()
    return True


class Command:
    """`edge-runtime ...` as a process whose events are read as they come."""

    def __init__(self, *arguments: str, cache: Path | None = None, module: str = "edge_runtime.cli") -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if cache:
            environment["EDGE_RUNTIME_CACHE"] = str(cache)
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            text=True,
        )
        self.seen: list[dict[str, Any]] = []
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._output: list[str] = []
        self._error = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._output.append(line)
            self._lines.put(line)
        self._lines.put(None)

    def until(self, holds: Callable[[dict[str, Any]], bool], timeout_s: float = 90.0) -> dict[str, Any]:
        """Read events until one holds; fails when the process ends or the time is over."""
        patience = Patience(timeout_s)
        while True:
            try:
                line = self._lines.get(timeout=patience.left_s())
            except queue.Empty:
                if patience.left_s():
                    continue
                raise AssertionError(f"not seen within {timeout_s} s; events: {self.seen[-8:]}") from None
            if line is None:
                self.process.wait(10)
                raise AssertionError(
                    f"it ended with {self.process.returncode}: {self.error()}; events: {self.seen[-8:]}"
                )
            event = json.loads(line)
            self.seen.append(event)
            if holds(event):
                return event

    def phase(self, name: str, timeout_s: float = 90.0) -> dict[str, Any]:
        """Read events until one has this phase."""
        return self.until(lambda event: event["phase"] == name, timeout_s)

    def end(self, timeout_s: float = 90.0) -> int:
        """Wait for the end; its exit code."""
        patience = Patience(timeout_s)
        while left_s := patience.left_s():
            with suppress(subprocess.TimeoutExpired):
                return self.process.wait(left_s)
        self.until(lambda _: False, 0.1)  # which fails, and shows what it did
        raise AssertionError("unreachable")

    def error(self) -> str:
        """What it wrote to stderr; only after its end."""
        assert self.process.stderr is not None
        self._error += self.process.stderr.read()
        return self._error.strip()

    def output(self) -> str:
        """All that it wrote to stdout; only after its end."""
        self._reader.join(10)
        return "".join(self._output)

    def children(self) -> list[int]:
        """The processes it has started and that still run."""
        threads = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        return [int(pid) for path in threads for pid in path.read_text().split()]

    def kill(self) -> None:
        """End it as a power cut would."""
        self.process.kill()
        self.process.wait(10)


def resident_bytes(command: Command, field: str = "VmRSS") -> int:
    """A figure of the process in /proc."""
    for line in Path(f"/proc/{command.process.pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no {field}")


class Fleet:
    """One test's fleet: writes its file and starts its processes; ends them all."""

    def __init__(self, broker: Broker, cache: Path, folder: Path, rows: Path, name: str) -> None:
        self.broker, self.cache, self.folder, self.rows, self.name = (broker, cache, folder, rows, name)
        self.running: list[Command] = []

    def write(
        self,
        *models: tuple[str, int],
        method: str = "fedit",
        rounds: int = 1,
        quorum: int = 1,
        deadline_s: float = 600,  # a slow machine measures itself before its first round
        extensions: int = 0,
        steps: int = 4,
    ) -> None:
        """fleet.toml; models are (source, depth) in order of preference."""
        head = FLEET.format(
            name=self.name,
            rounds=rounds,
            quorum=quorum,
            deadline_s=deadline_s,
            extensions=extensions,
            method=method,
            steps=steps,
        )
        catalog = "".join(
            MODEL.format(source=source, depth=depth) for source, depth in models or [("none", 1)]
        )
        (self.folder / "fleet.toml").write_text(head + catalog)

    def node(self, *more: str) -> Command:
        """The aggregator, on this test's state."""
        where = ("--fleet", str(self.folder / "fleet.toml"), "--state", str(self.folder / "node"))
        return self._start("aggregator", *where, "--broker", self.broker.url, "--json", *more)

    def noise_node(self, *more: str) -> Command:
        """A node that takes any payload, on this test's state."""
        where = ("--fleet", str(self.folder / "fleet.toml"), "--state", str(self.folder / "node"))
        return self._start("--broker", self.broker.url, *where, *more, module="benchmarks.noise_node")

    def agent(self, id: str, *more: str) -> Command:
        """A device, on its own state."""
        device = (
            "--fleet",
            self.name,
            "--id",
            id,
            "--data",
            str(self.rows),
            "--state",
            str(self.folder / id),
        )
        return self._start("agent", *device, "--broker", self.broker.url, "--threads", "1", "--json", *more)

    def noise(self, id: str, size: str, *more: str) -> Command:
        """A device that sends so much noise a round instead of a delta, to a `noise_node`."""
        device = ("--fleet", self.name, "--id", id, "--size", size, "--state", str(self.folder / id))
        return self._start("--broker", self.broker.url, *device, *more, module="benchmarks.noise")

    def _start(self, *arguments: str, module: str = "edge_runtime.cli") -> Command:
        self.running.append(Command(*arguments, cache=self.cache, module=module))
        return self.running[-1]
