"""The demo: a broker, an aggregator and three agents, as processes, on a real model.

Each device has its domain of commands and its budget. The planner chooses which size of the model
a device trains.
"""

import contextlib
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import edge_profiles
import msgspec
from edge_broker import address, credentials
from edge_broker.address import Address
from edge_broker.local import start_broker

from edge_runtime.agent.options import DeviceEvent
from edge_runtime.aggregator.node import NodeEvent
from edge_runtime.demo import commands, model, outcome
from edge_runtime.demo.live import Live
from edge_runtime.errors import EdgeError
from edge_runtime.models.facts import Facts
from edge_runtime.planning import processes
from edge_runtime.planning.candidates import candidates
from edge_runtime.planning.time import Rates
from edge_runtime.settings import Fleet, load
from edge_runtime.trainer import data

TRAIN_ROWS, HELD_OUT_ROWS = 320, 40
# Longest time without a word from any process. The whole may take long on a slow machine.
SILENCE_S = 900.0
FLEET = Path(__file__).with_name("fleet.toml")

Child = subprocess.Popen[bytes]
# A process's name and its next line of JSON; None: the process has ended.
Lines = queue.SimpleQueue[tuple[str, bytes | None]]


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
        threads = max(1, edge_profiles.probe().cpu_cores // len(commands.DOMAINS))
        # The agents find what is measured here in the cache.
        facts, rates = processes.catalog_facts(fleet, model.path().parent), processes.rates("cpu", threads)
        budgets = budgets_bytes(fleet, facts, processes.runtime_bytes(), rates)
        # The processes, on a broker of the user's or of our own.
        if broker is None:
            local = start_broker(port=0, state_dir=folder / "broker")
            stack.callback(local.stop)
            broker = address.parse(local.url)
        environment = credentials.hand_over(broker, os.environ)
        children: dict[str, Child] = {}
        lines: Lines = queue.SimpleQueue()
        stack.callback(_end, children)
        for name, words in arguments(folder, broker, budgets, threads).items():
            children[name] = _start(name, words, folder, environment, lines)
        live = Live(budgets, fleet.rounds)
        with live.display:
            follow(children, lines, live, folder, kept=keep is not None)
        return outcome.read(method, fleet.rounds, budgets, folder, time.monotonic() - started)


def budgets_bytes(fleet: Fleet, facts: dict[str, Facts], runtime_bytes: int, rates: Rates) -> dict[str, int]:
    """The budget of each device, so that each trains another size of the model.

    A size fits a budget that is at least its smallest predicted peak, whichever weight format has
    that peak. So a budget between the smallest peaks of two neighbouring sizes fits the smaller
    size and no larger size. Budgets lie halfway.

    Args:
        fleet: its catalog has at least as many depths as there are devices, the largest first.
        facts: by source of the catalog.
        runtime_bytes: the runtime baseline of this machine, which every peak includes.
        rates: of this machine; budgets do not depend on them.
    """
    smallest: dict[int, int] = {}  # predicted peak by depth
    for plans in candidates(fleet, facts, runtime_bytes, rates):
        peak_bytes = min(plan.predicted_peak_bytes for plan in plans)
        smallest[plans[0].depth] = min(peak_bytes, smallest.get(plans[0].depth, peak_bytes))
    peaks = sorted(smallest.values(), reverse=True)
    # the largest size has as much room above it as the next one
    above = [2 * peaks[0] - peaks[1], *peaks]
    return {
        name: (larger + peak_bytes) // 2
        for name, larger, peak_bytes in zip(commands.DOMAINS, above, peaks, strict=False)
    }


def arguments(folder: Path, broker: Address, budgets: dict[str, int], threads: int) -> dict[str, list[str]]:
    """Arguments of each process, by name. Also writes each device's rows to its folder.

    The broker's user and password are not among them. threads: of each trainer.
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
            *("--threads", str(threads), "--until-finished", "--json"),
        ]
    return by_name


def _start(name: str, words: list[str], folder: Path, environment: dict[str, str], lines: Lines) -> Child:
    """Start a process; its output goes to the queue and to NAME.jsonl, its errors to NAME.log."""
    command = [sys.executable, "-m", "edge_runtime.cli", *words]
    with (folder / f"{name}.log").open("wb") as errors:
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=environment)

    def read() -> None:
        assert child.stdout is not None
        with (folder / f"{name}.jsonl").open("wb") as log:
            for line in child.stdout:
                log.write(line)
                lines.put((name, line))
        child.wait()
        lines.put((name, None))

    threading.Thread(target=read, daemon=True).start()
    return child


def _end(children: dict[str, Child]) -> None:
    # All are told first, so that they end side by side.
    for child in children.values():
        child.terminate()
    for child in children.values():
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            child.kill()


def follow(children: dict[str, Child], lines: Lines, live: Live, folder: Path, *, kept: bool) -> None:
    """Show events until every process has ended with exit code 0.

    kept: the folder stays; else nobody is sent to look for adapters and logs in it.
    """
    running = set(children)
    while running:
        try:
            name, line = lines.get(timeout=SILENCE_S)
        except queue.Empty:
            logs = f"logs are in {folder}" if kept else "give --keep FOLDER to keep the logs"
            raise EdgeError(f"no process of the demo said anything for {SILENCE_S:g} s; {logs}") from None
        if line is None:
            running.discard(name)
            if children[name].returncode != 0:
                log = (folder / f"{name}.log").read_text(errors="replace").strip().splitlines()
                reason = log[-1] if log else "its log is empty"
                raise EdgeError(f"{name} ended with exit code {children[name].returncode}: {reason}")
        elif name == "node":
            live.show(msgspec.json.decode(line, type=NodeEvent))
        else:
            event = msgspec.json.decode(line, type=DeviceEvent)
            if event.phase == "finished" and not kept:
                event = msgspec.structs.replace(event, text="give --keep FOLDER to keep the adapter")
            live.show(event)
