"""The demo: a broker, an aggregator and three agents as processes of their own, on one machine, on a real model.

Each device has its domain of commands and its budget; which model it trains is the planner's choice. The budgets are
given above what the runtime itself takes here, so that they mean the same on every machine.
"""

import contextlib
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
from edge_broker import address, credentials
from edge_broker.address import Address
from edge_broker.local import start_broker

from edge_runtime.agent.options import Event
from edge_runtime.aggregator import node
from edge_runtime.aggregator.store import Store
from edge_runtime.demo import commands, model
from edge_runtime.demo.live import Live
from edge_runtime.errors import EdgeError
from edge_runtime.planning import processes
from edge_runtime.protocol.report import Report, Score
from edge_runtime.settings import load
from edge_runtime.trainer import data

MIB = 1 << 20
BUDGETS_ABOVE_RUNTIME = {"kitchen": 560 * MIB, "garage": 405 * MIB, "garden": 305 * MIB}
TRAIN_ROWS, HELD_OUT_ROWS = 320, 40
TIMEOUT_S = 1800.0
FLEET = Path(__file__).with_name("fleet.toml")


class Device(msgspec.Struct):
    """One line of the demo's table. before: of version 0; after: of what the device has in the end."""

    id: str
    budget_bytes: int
    model: str
    depth: int
    weights: str
    predicted_peak_bytes: int
    measured_peak_bytes: int
    bytes_up: int
    bytes_down: int
    loss_before: float | None
    loss_after: float | None
    accuracy_before: float
    accuracy_after: float
    others_loss_before: float | None
    others_loss_after: float | None
    others_accuracy_before: float
    others_accuracy_after: float
    seconds: dict[str, float]


class Outcome(msgspec.Struct):
    """faults: what keeps the demo from counting as good, in sentences; empty when all is well."""

    method: str
    rounds: int
    rounds_closed: int
    seconds: float
    devices: list[Device]
    faults: list[str]


def run(method: str, broker: Address | None, keep: Path | None) -> Outcome:
    """Run the fleet to its end.

    Args:
        method: federated method.
        broker: address of a broker that already runs, or None to start one.
        keep: folder for state, logs and adapters, or None for one that is deleted.

    Raises:
        EdgeError: a process failed or nothing ended in time; it says which log to read.
    """
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        folder = (
            keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="edge-runtime-demo-")))
        ).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "node").exists():
            raise EdgeError(f"{folder} holds an earlier demo: remove it or keep this one elsewhere")
        fleet_file = folder / "fleet.toml"
        fleet_file.write_text(FLEET.read_text().replace('name = "fedit"', f'name = "{method}"'))
        fleet = load(fleet_file)
        budgets = {name: processes.runtime_bytes() + above for name, above in BUDGETS_ABOVE_RUNTIME.items()}
        if broker is None:
            running = start_broker(port=0, state_dir=folder / "broker")
            stack.callback(running.stop)
            broker = address.parse(running.url)
        lines: queue.SimpleQueue[tuple[str, bytes | None]] = queue.SimpleQueue()
        children = stack.enter_context(
            _processes(
                _commands(folder, broker, budgets), credentials.hand_over(broker, os.environ), folder, lines
            )
        )
        with Live(budgets, fleet.rounds) as live:
            _follow(children, lines, live, folder)
        return _outcome(method, fleet.rounds, budgets, folder, time.monotonic() - started)


def _commands(folder: Path, broker: Address, budgets: dict[str, int]) -> dict[str, list[str]]:
    """The command line of every process, after `edge-runtime`; each device's rows are written to its own folder."""
    found = {
        "node": [
            *("aggregator", "--fleet", str(folder / "fleet.toml"), "--state", str(folder / "node")),
            *("--broker", broker.without_credentials(), "--until-finished", "--json"),
        ]
    }
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(1, cores // len(budgets))
    for name, budget in budgets.items():
        home = folder / name
        home.mkdir()
        rows = commands.rows(name, TRAIN_ROWS, HELD_OUT_ROWS, seed=0)
        own = data.write_rows(home / "own.jsonl", rows.held_out)
        others = data.write_rows(home / "others.jsonl", rows.others_held_out)
        found[name] = [
            *(
                "agent",
                "--broker",
                broker.without_credentials(),
                "--fleet",
                "demo",
                "--id",
                name,
                "--state",
                str(home / "state"),
            ),
            *("--data", str(data.write_rows(home / "train.jsonl", rows.train)), "--budget", str(budget)),
            *("--eval", f"own={own}", "--eval", f"others={others}", "--models", str(model.path().parent)),
            *("--threads", str(threads), "--until-finished", "--json"),
        ]
    return found


@contextlib.contextmanager
def _processes(
    lines_of: dict[str, list[str]],
    environment: dict[str, str],
    folder: Path,
    lines: "queue.SimpleQueue[tuple[str, bytes | None]]",
) -> Iterator[dict[str, "subprocess.Popen[bytes]"]]:
    """Start the processes; what they print goes to the queue, and a None when one ends. None is left behind."""
    children: dict[str, subprocess.Popen[bytes]] = {}

    def read(name: str, child: "subprocess.Popen[bytes]") -> None:
        assert child.stdout is not None
        with (folder / f"{name}.jsonl").open("wb") as log:
            for line in child.stdout:
                log.write(line)
                lines.put((name, line))
        child.wait()
        lines.put((name, None))

    try:
        for name, arguments in lines_of.items():
            with (folder / f"{name}.log").open("wb") as errors:
                children[name] = subprocess.Popen(
                    [sys.executable, "-m", "edge_runtime.cli", *arguments],
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    env=environment,
                )
            threading.Thread(target=read, args=(name, children[name]), daemon=True).start()
        yield children
    finally:
        for child in children.values():
            child.terminate()
        for child in children.values():
            try:
                child.wait(10)
            except subprocess.TimeoutExpired:
                child.kill()


def _follow(
    children: dict[str, "subprocess.Popen[bytes]"],
    lines: "queue.SimpleQueue[tuple[str, bytes | None]]",
    live: Live,
    folder: Path,
) -> None:
    """Show events until every process has ended well."""
    deadline = time.monotonic() + TIMEOUT_S
    running = set(children)
    while running:
        try:
            name, line = lines.get(timeout=max(deadline - time.monotonic(), 0.0))
        except queue.Empty:
            raise EdgeError(f"the demo did not end within {TIMEOUT_S:g} s; logs are in {folder}") from None
        if line is not None:
            if name == "node":
                live.show(msgspec.json.decode(line, type=node.Event))
            else:
                live.show(msgspec.json.decode(line, type=Event))
            continue
        running.discard(name)
        if children[name].returncode != 0:
            said = (folder / f"{name}.log").read_text(errors="replace").strip().splitlines()
            raise EdgeError(
                f"{name} ended with exit code {children[name].returncode}: {said[-1] if said else 'no word'}"
            )


def _outcome(method: str, rounds: int, budgets: dict[str, int], folder: Path, seconds: float) -> Outcome:
    store = Store(folder / "node" / "node.db")
    reports = [
        msgspec.json.decode(row[0], type=Report)
        for row in store.connection.execute("SELECT body FROM reports ORDER BY device, round, state DESC")
    ]
    closed = store.open_round() - 1
    store.connection.close()
    devices = [
        _device(name, budget, [one for one in reports if one.device == name])
        for name, budget in budgets.items()
    ]
    faults = [f"{closed} of {rounds} rounds closed"] if closed != rounds else []
    for device in devices:
        if device.measured_peak_bytes > device.budget_bytes:
            over = (device.measured_peak_bytes - device.budget_bytes) / MIB
            faults.append(f"{device.id} went {over:.0f} MiB over its budget")
        before, after = device.loss_before, device.loss_after
        if before is None or after is None or not after < before:
            faults.append(f"the held-out loss of {device.id} did not fall")
    return Outcome(method, rounds, closed, seconds, devices, faults)


def _device(name: str, budget: int, reports: list[Report]) -> Device:
    results = [report.result for report in reports if report.result is not None]
    plans = [report.plan for report in reports if report.plan is not None]
    if len(results) < 2 or not plans:
        raise EdgeError(
            f"{name} sent {len(results)} reports with results; at least the first round's and the last are needed"
        )
    plan = plans[-1]
    before, after = results[0].evaluation, results[-1].evaluation
    own, others = (_pair(before, after, key) for key in ("held_out_1", "held_out_2"))  # as --eval has them
    phases = {phase for result in results for phase in result.seconds}
    return Device(
        id=name,
        budget_bytes=budget,
        model=plan.model_class,
        depth=plan.depth,
        weights=plan.weights,
        predicted_peak_bytes=plan.predicted_peak_bytes,
        measured_peak_bytes=max(result.measured_peak_bytes for result in results),
        bytes_up=sum(report.bytes_up for report in reports if report.state != "joined"),
        bytes_down=sum(report.bytes_down for report in reports if report.state != "joined"),
        loss_before=own[0].loss,
        loss_after=own[1].loss,
        accuracy_before=own[0].accuracy,
        accuracy_after=own[1].accuracy,
        others_loss_before=others[0].loss,
        others_loss_after=others[1].loss,
        others_accuracy_before=others[0].accuracy,
        others_accuracy_after=others[1].accuracy,
        seconds={
            phase: round(sum(result.seconds.get(phase, 0.0) for result in results), 1)
            for phase in sorted(phases)
        },
    )


def _pair(before: dict[str, Score], after: dict[str, Score], key: str) -> tuple[Score, Score]:
    return before[key], after[key]
