"""The demo: a broker, an aggregator and three agents, as processes, on a real model.

Each device has its domain of commands and its budget. The planner chooses which size of the model a device trains.
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

from edge_runtime.agent.options import DeviceEvent
from edge_runtime.aggregator import node
from edge_runtime.demo import commands, model, outcome
from edge_runtime.demo.budgets import budgets_bytes
from edge_runtime.demo.live import Live
from edge_runtime.errors import EdgeError
from edge_runtime.planning import processes
from edge_runtime.settings import Fleet, load
from edge_runtime.trainer import data

TRAIN_ROWS, HELD_OUT_ROWS = 320, 40
# Longest time without a word from any process. The whole may take long on a slow machine.
SILENCE_S = 900.0
FLEET = Path(__file__).with_name("fleet.toml")

# A process's name and its next line of JSON; None: the process has ended.
Lines = queue.SimpleQueue[tuple[str, bytes | None]]
Children = dict[str, "subprocess.Popen[bytes]"]


def run(method: str, broker: Address | None, keep: Path | None) -> outcome.DemoOutcome:
    """Run the fleet to its end.

    Args:
        method: federated method.
        broker: address of a running broker, or None to start one.
        keep: folder for state, logs and adapters, or None for one that is deleted.

    Raises:
        EdgeError: a process failed, or all were silent; the message names the log to read.
    """
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        folder = keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="edge-runtime-demo-")))
        folder = folder.resolve()
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "node").exists():
            raise EdgeError(f"{folder} holds an earlier demo: remove it or keep this one elsewhere")
        # The fleet: the demo's file with the method, and a budget for each device.
        fleet_file = folder / "fleet.toml"
        fleet_file.write_text(FLEET.read_text().replace('name = "fedit"', f'name = "{method}"'))
        fleet = load(fleet_file)
        budgets = _budgets(fleet)
        # The processes, on a broker of the user's or of our own.
        if broker is None:
            local = start_broker(port=0, state_dir=folder / "broker")
            stack.callback(local.stop)
            broker = address.parse(local.url)
        lines: Lines = queue.SimpleQueue()
        environment = credentials.hand_over(broker, os.environ)
        by_name = arguments(folder, broker, budgets)
        children = stack.enter_context(_processes(by_name, environment, folder, lines))
        with Live(budgets, fleet.rounds) as live:
            _follow(children, lines, live, folder)
        return outcome.read(method, fleet.rounds, budgets, folder, time.monotonic() - started)


def _budgets(fleet: Fleet) -> dict[str, int]:
    """The devices' budgets. The agents find this function's measurements in the cache."""
    facts = processes.catalog_facts(fleet, model.path().parent)
    return budgets_bytes(fleet, facts, processes.runtime_bytes(), processes.rates("cpu", _threads()))


def _threads() -> int:
    """CPU threads of each trainer: the cores in equal parts."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // len(commands.DOMAINS))


def arguments(folder: Path, broker: Address, budgets: dict[str, int]) -> dict[str, list[str]]:
    """Arguments of each process, by name. Also writes each device's rows to its folder.

    The broker's user and password are not among them.
    """
    url = broker.without_credentials()
    by_name = {
        "node": [
            *("aggregator", "--fleet", str(folder / "fleet.toml"), "--state", str(folder / "node")),
            *("--broker", url, "--until-finished", "--json"),
        ]
    }
    for name, budget_bytes in budgets.items():
        home = folder / name
        home.mkdir()
        rows = commands.rows(name, TRAIN_ROWS, HELD_OUT_ROWS, seed=0)
        train = data.write_rows(home / "train.jsonl", rows.train)
        held_out = data.write_rows(home / "own.jsonl", rows.held_out)
        foreign = data.write_rows(home / "others.jsonl", rows.others_held_out)
        by_name[name] = [
            *("agent", "--broker", url, "--fleet", "demo", "--id", name, "--state", str(home / "state")),
            *("--data", str(train), "--eval", f"own={held_out}", "--eval", f"others={foreign}"),
            *("--models", str(model.path().parent), "--budget", str(budget_bytes)),
            *("--threads", str(_threads()), "--until-finished", "--json"),
        ]
    return by_name


@contextlib.contextmanager
def _processes(
    by_name: dict[str, list[str]], environment: dict[str, str], folder: Path, lines: Lines
) -> Iterator[Children]:
    """Start the processes and put what they print into the queue; ends them all at exit."""
    children: Children = {}
    try:
        for name, words in by_name.items():
            with (folder / f"{name}.log").open("wb") as errors:
                children[name] = subprocess.Popen(
                    [sys.executable, "-m", "edge_runtime.cli", *words],
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    env=environment,
                )
            reader = (name, children[name], folder / f"{name}.jsonl", lines)
            threading.Thread(target=_read, args=reader, daemon=True).start()
        yield children
    finally:
        # All are told first, so that they end side by side.
        for child in children.values():
            child.terminate()
        for child in children.values():
            try:
                child.wait(10)
            except subprocess.TimeoutExpired:
                child.kill()


def _read(name: str, child: "subprocess.Popen[bytes]", copy: Path, lines: Lines) -> None:
    assert child.stdout is not None
    with copy.open("wb") as log:
        for line in child.stdout:
            log.write(line)
            lines.put((name, line))
    child.wait()
    lines.put((name, None))


def _follow(children: Children, lines: Lines, live: Live, folder: Path) -> None:
    """Show events until every process has ended with exit code 0."""
    running = set(children)
    while running:
        try:
            name, line = lines.get(timeout=SILENCE_S)
        except queue.Empty:
            raise EdgeError(
                f"no process of the demo said anything for {SILENCE_S:g} s; logs are in {folder}"
            ) from None
        if line is not None:
            if name == "node":
                live.show(msgspec.json.decode(line, type=node.NodeEvent))
            else:
                live.show(msgspec.json.decode(line, type=DeviceEvent))
            continue
        running.discard(name)
        if children[name].returncode != 0:
            log = (folder / f"{name}.log").read_text(errors="replace").strip().splitlines()
            reason = log[-1] if log else "its log is empty"
            raise EdgeError(f"{name} ended with exit code {children[name].returncode}: {reason}")
