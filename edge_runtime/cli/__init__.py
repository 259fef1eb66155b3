"""The command `edge-runtime`: options and output; what is done is done elsewhere, and imported where it is needed.

Exit codes: 0 done, 1 the result is not good, 2 bad input, 3 no broker or fleet, 4 no plan fits, 5 the trainer failed.
"""

import logging
import signal
import sqlite3
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from edge_runtime.cli.options import at_broker
from edge_runtime.errors import EdgeError, InputError, LinkError

if TYPE_CHECKING:
    from edge_broker.address import Address
    from edge_profiles import Profile

    from edge_runtime.settings import Boundaries, Weights

log = logging.getLogger(__name__)


def _name(_context: click.Context, option: click.Parameter, name: str) -> str:
    """The name as it is, once it can be part of a topic: told before a state is made."""
    from edge_broker import topics
    from edge_broker.errors import LinkError as BrokerError

    try:
        return topics.name(option.opts[0], name)
    except BrokerError as error:
        raise InputError(str(error)) from None


as_json = click.option("--json", "json", is_flag=True, help="Print JSON instead of text.")
from_fleet_file = click.option(
    "--fleet",
    type=click.Path(path_type=Path),
    required=True,
    help="The fleet file (TOML); docs/fleet.md describes it.",
)
within_budget = click.option(
    "--budget",
    help="Memory the trainer may take, such as 900MiB; default: most of what is free, as the README of device_profiles says.",
)
as_board = click.option(
    "--board",
    help="Hold the trainer to what this board, such as jetson-orin-nano-8gb, leaves it; needs a larger GPU.",
)
with_models = click.option(
    "--models",
    type=click.Path(path_type=Path),
    default=Path(),
    help="Folder in which relative paths of the catalog are looked for.",
)

on_device = click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where the trainer runs.",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def app() -> None:
    """Unequal devices fine-tune language models on their own data and learn from each other over MQTT."""


@app.command()
@as_json
def profile(json: bool) -> None:
    """Show this device as the planner sees it.

    Cores, memory, GPU, board, and what the runtime itself takes.
    """
    from edge_runtime.cli import views

    values = {**msgspec.to_builtins(_probe()), "runtime_baseline_bytes": _runtime_bytes()}
    views.show_profile(values) if not json else _print(values)


@app.command()
@from_fleet_file
@within_budget
@click.option("--board", help="Plan for a board one does not have, such as jetson-orin-nano-8gb.")
@with_models
@on_device
@as_json
def plan(fleet: Path, budget: str | None, board: str | None, models: Path, device: str, json: bool) -> None:
    """Show which model fits, and why no larger one.

    Of the fleet's catalog, on this device or on a board one does not have.
    """

    from edge_runtime import methods, settings
    from edge_runtime.cli import views
    from edge_runtime.planning import processes
    from edge_runtime.planning.search import choose

    wanted = settings.load(fleet)
    methods.of(wanted)  # what the node would refuse is not planned
    if board and wanted.training.step_deadline_s is not None:
        raise InputError(
            "[training] step_deadline_s cannot be kept for a board one does not have: how fast it is was never measured; "
            "leave the key out to plan for the board's memory alone"
        )
    here = _probe()
    budget_bytes = _budget(budget, board, here)
    facts = {source: processes.prepared(source, models) for source in {one.source for one in wanted.catalog}}
    rates = processes.rates(_device(device, here))
    choice = choose(wanted, facts, budget_bytes, processes.runtime_bytes(), rates)
    limits = budget_bytes, wanted.training.step_deadline_s
    views.show_plan(choice, *limits) if not json else _print(views.plan_values(choice, *limits))


@app.command()
@click.option("--model", required=True, help="A folder in Hugging Face's layout, a GGUF file or a hub id.")
@click.option(
    "--random-weights", is_flag=True, help="Draw the weights: the model's folder needs a config.json alone."
)
@click.option(
    "--weights",
    type=click.Choice(["float32", "bfloat16", "q8_0", "q4_1", "q4_0", "nf4"]),
    default="bfloat16",
    show_default=True,
)
@click.option(
    "--boundaries",
    type=click.Choice(["input", "int8"]),
    default="input",
    show_default=True,
    help="How each block's input is kept for backward.",
)
@click.option(
    "--stream",
    "streamed",
    is_flag=True,
    help="Leave packed weights in files, and read each block when it runs.",
)
@click.option(
    "--kept-blocks",
    default=0,
    show_default=True,
    help="How many of the blocks keep all that backward needs and run once.",
)
@click.option("--rank", default=16, show_default=True, help="Rank of the adapter on all linear layers.")
@click.option("--batch", default=4, show_default=True, help="Rows of a step.")
@click.option("--tokens", default=256, show_default=True, help="Tokens of a row.")
@click.option(
    "--steps",
    default=6,
    show_default=True,
    help="Steps to train; the time is the median after the first two.",
)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@as_board
@click.option(
    "--against",
    type=click.Choice(["peft"]),
    help="Train the same with PEFT, AdamW and gradient checkpointing.",
)
@with_models
@as_json
def measure(
    model: str,
    random_weights: bool,
    weights: "Weights",
    boundaries: "Boundaries",
    streamed: bool,
    kept_blocks: int,
    rank: int,
    batch: int,
    tokens: int,
    steps: int,
    device: str,
    board: str | None,
    against: str | None,
    models: Path,
    json: bool,
) -> None:
    """Train a model for a few steps and show what it took.

    Predicted and measured peak memory of each phase, time a step, and the same of PEFT if wanted.
    """
    from edge_runtime.agent import measure as measuring
    from edge_runtime.cli import views
    from edge_runtime.methods import MOST_RANK

    for name, value in {"rank": rank, "batch": batch, "tokens": tokens, "steps": steps}.items():
        if value < 1:
            raise InputError(f"--{name} is {value}, but has to be 1 or more")
    if rank > MOST_RANK:
        raise InputError(f"--rank is {rank}, but can be {MOST_RANK} at most")
    found = _probe()
    done = measuring.measure(
        model,
        models,
        weights=weights,
        rank=rank,
        rows=batch,
        tokens=tokens,
        steps=steps,
        device=_device(device, found),
        peft=against == "peft",
        boundaries=boundaries,
        streamed=streamed,
        kept_blocks=kept_blocks,
        random_weights=random_weights,
        gpu_cap_bytes=_cap(board, device, found),
    )
    views.show_measurement(done) if not json else _print(done)


@app.command()
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=1883,
    show_default=True,
    help="Port to listen on; 0 takes a free one.",
)
@click.option(
    "--state",
    type=click.Path(path_type=Path),
    default=Path("broker-state"),
    show_default=True,
    help="Where its configuration and log are kept.",
)
@click.option(
    "--kind", type=click.Choice(["auto", "mosquitto", "embedded"]), default="auto", show_default=True
)
def broker(port: int, state: Path, kind: str) -> None:
    """Run a broker on this machine's loopback.

    Mosquitto if it is installed, else the embedded one.
    """
    from edge_broker.local import start_broker

    running = start_broker(port=port, state_dir=state, kind=kind)
    _say(f"{running.kind} listens at {running.url}; stop it with Ctrl-C")
    try:
        signal.sigwait({signal.SIGINT, signal.SIGTERM})
    finally:
        running.stop()


@app.command()
@click.argument("spec", type=click.Path(path_type=Path))
@click.option("--seeds", help="Seeds to run, such as 0,1,2; default: the file's.")
@click.option("--arms", help="Arms to run, separated by commas, such as fedit,heterotune-gate; default: all.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder for runs, table and pictures; default: docs/study/<spec>.",
)
@click.option(
    "--data", type=click.Path(path_type=Path), default=Path(), help="Folder of the study's data files."
)
@with_models
@click.option(
    "--workers",
    type=click.IntRange(0),
    default=0,
    help="Runs at a time, one core each; default: as many as there are cores.",
)
def study(
    spec: Path, seeds: str | None, arms: str | None, out: Path | None, data: Path, models: Path, workers: int
) -> None:
    """Compare methods on virtual devices: a grid of arms by seeds.

    Runs that are done are kept, so a study that was stopped goes on where it was. SPEC is a file such as those in studies/.
    """
    import os

    from edge_runtime.planning import processes
    from edge_runtime.simulation import grid
    from edge_runtime.simulation import spec as specs

    if not processes.study_installed():
        raise InputError(
            "a study's packages are not installed: in a clone of Edge Runtime, run pip install '.[study]'"
        )

    wanted = specs.load(spec)
    chosen = specs.chosen(wanted, seeds, arms)
    folder = out or Path("docs/study") / spec.stem
    failed = grid.run(chosen, data, models, folder, workers or os.cpu_count() or 1, _say)
    from edge_runtime.simulation import report

    wanted = specs.with_seeds(wanted, chosen.study.seeds)
    found = grid.kept(wanted, folder)
    report.write(wanted, found, spec.stem, folder)
    report.show(wanted, found, spec.stem)
    _say(f"written: {folder / 'README.md'}")
    if failed:
        raise EdgeError(
            f"not all runs are done; those that failed are tried again when the command is given again: {'; '.join(failed)}"
        )


@app.command()
@from_fleet_file
@click.option(
    "--state",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder for rounds, updates and global versions; give the same one to go on.",
)
@at_broker()
@click.option("--node", default="node", show_default=True, callback=_name, help="This node's name.")
@click.option("--until-finished", is_flag=True, help="End when the last round is merged and reported.")
@click.option("--noop", is_flag=True, hidden=True)
@as_json
def aggregator(
    fleet: Path, state: Path, broker: "Address", node: str, until_finished: bool, noop: bool, json: bool
) -> None:
    """Run a fleet's node.

    It announces rounds, takes in the devices' deltas, merges them, and publishes the global versions.
    """
    from edge_runtime import settings
    from edge_runtime.aggregator.node import Event, Node, Options
    from edge_runtime.state import alone

    def tell(event: Event) -> None:
        there = f"; in: {', '.join(event.in_) or 'nobody'}" + (
            f"; missing: {', '.join(event.missing)}" if event.missing else ""
        )
        text = f": {event.text}" if event.text else ""
        _print(event) if json else _say(f"round {event.round}: {event.phase}{text}{there}")

    known = settings.load(fleet)
    with alone(state):
        Node(known, Options(broker, state.resolve(), node, until_finished, noop), tell).run()


@app.command()
@at_broker()
@click.option("--fleet", required=True, callback=_name, help="The fleet's name, as its fleet file has it.")
@click.option("--id", required=True, callback=_name, help="This device's name, unique in the fleet.")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    required=True,
    help="This device's rows, one JSON object a line; they never leave it.",
)
@click.option(
    "--state",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder for keys, adapters and work; give the same one to go on.",
)
@within_budget
@click.option(
    "--eval",
    "evaluation",
    multiple=True,
    help="Held-out rows as NAME=FILE.jsonl; default: a tenth of the data.",
)
@with_models
@click.option("--threads", default=0, help="CPU threads of the trainer; default: all cores.")
@on_device
@as_board
@click.option("--wait", default=120.0, show_default=True, help="Seconds to wait for the fleet's first round.")
@click.option("--until-finished", is_flag=True, help="End when the fleet has finished.")
@click.option("--noop", hidden=True)
@as_json
def agent(
    broker: "Address",
    fleet: str,
    id: str,
    data: Path,
    state: Path,
    budget: str | None,
    evaluation: tuple[str, ...],
    models: Path,
    threads: int,
    device: str,
    board: str | None,
    wait: float,
    until_finished: bool,
    noop: str | None,
    json: bool,
) -> None:
    """Take part in a fleet from this device.

    Everything but its data comes from the fleet's node.
    """

    from edge_runtime.agent.agent import Agent
    from edge_runtime.agent.options import Event, Options
    from edge_runtime.state import alone

    if not 0 < wait < float("inf"):
        raise InputError(f"--wait is {wait:g}, but has to be seconds, more than 0")
    found = _probe()
    cap_bytes = _cap(board, device, found)
    options = Options(
        broker=broker,
        fleet=fleet,
        id=id,
        data=data,
        state=state.resolve(),
        budget_bytes=_budget(budget, board, found),
        evaluation=_evaluation(evaluation),
        models=models,
        threads=threads,
        device=_device(device, found),
        gpu_cap_bytes=cap_bytes,
        wait_s=wait,
        until_finished=until_finished,
        noop_bytes=_size(noop) if noop else 0,
    )

    def tell(event: Event) -> None:
        if json:
            _print(event)
            return
        loss = f", loss {event.loss:.3f}" if event.loss is not None else ""
        step = f" {event.step}/{event.steps}" if event.steps else ""
        memory = (
            f", {event.memory_bytes >> 20} of {event.budget_bytes >> 20} MiB" if event.memory_bytes else ""
        )
        text = f": {event.text}" if event.text else ""
        _say(f"{event.device}, round {event.round}: {event.phase}{step}{loss}{memory}{text}")

    with alone(state):
        Agent(options, tell).run()


@app.command()
@at_broker()
@click.option("--fleet", required=True, callback=_name, help="The fleet's name.")
@as_json
def status(broker: "Address", fleet: str, json: bool) -> None:
    """Show a fleet's round and its devices.

    Presence, plan, memory and scores of each, as the broker has them now.
    """
    from edge_runtime.cli import views
    from edge_runtime.protocol import status as status_

    seen = status_.read(broker, fleet)
    views.show_status(seen) if not json else _print(seen)


@app.command()
@click.option(
    "--method",
    default="fedit",
    show_default=True,
    help="As in [method] of a fleet file; local is the control.",
)
@at_broker(default=None)
@click.option("--keep", type=click.Path(path_type=Path), help="Keep state, logs and adapters in this folder.")
@click.option("--json", "json", type=click.Path(path_type=Path), help="Write the result to this file.")
def demo(method: str, broker: "Address | None", keep: Path | None, json: Path | None) -> None:
    """Run a whole fleet on this machine.

    A broker, an aggregator and three agents, as processes of their own, on a real model.
    """
    from edge_runtime.cli import views
    from edge_runtime.demo import run

    result = run.run(method, broker, keep)
    views.show_demo(result)
    if json:
        json.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=2) + b"\n")
    if result.faults:
        raise EdgeError("; ".join(result.faults))


def main() -> None:
    """Run the command line; an error becomes one sentence on stderr and its exit code."""
    from edge_broker.errors import LinkError as BrokerError
    from edge_profiles import ProfileError

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as a script's background processes have it
        signal.signal(signal.SIGINT, lambda *_: sys.exit(130))  # click would make it 1
    try:
        app(prog_name="edge-runtime")
    except EdgeError as error:
        _fail(str(error), error.exit_code)
    except ProfileError as error:
        _fail(str(error), InputError.exit_code)
    except BrokerError as error:
        _fail(str(error), LinkError.exit_code)
    except (
        OSError,
        sqlite3.DatabaseError,
    ) as error:  # a full disk, a folder that is not ours, a damaged file
        log.debug("", exc_info=True)
        _fail(
            f"a file cannot be read or written: {error}; what was kept before is as it was",
            InputError.exit_code,
        )


def _fail(message: str, code: int) -> None:
    sys.stderr.write(f"edge-runtime: {message}\n")
    sys.exit(code)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _print(value: Any) -> None:
    _say(msgspec.json.encode(value).decode())


def _probe() -> "Profile":
    from edge_profiles import probe

    return probe()


def _runtime_bytes() -> int | None:
    """The runtime baseline; None where the trainer's packages are not installed."""
    from edge_runtime.planning import processes

    return processes.runtime_bytes() if processes.trainer_installed() else None


def _size(text: str) -> int:
    from edge_profiles import parse_size

    return parse_size(text)


def _budget(given: str | None, board: str | None, found: "Profile") -> int:
    """What was given, else the default of the board or of this machine."""
    from edge_profiles import board as board_named
    from edge_profiles import default_budget_bytes, profile_of

    profile = profile_of(board_named(board)) if board else found
    return _size(given) if given else default_budget_bytes(profile)


def _device(wanted: str, found: "Profile") -> str:
    if wanted == "cuda" and found.gpu is None:
        raise InputError("--device is cuda, but no GPU was found: `edge-runtime profile` shows what is there")
    return ("cuda" if found.gpu else "cpu") if wanted == "auto" else wanted


def _cap(board: str | None, device: str, found: "Profile") -> int | None:
    from edge_profiles import board as board_named
    from edge_profiles import gpu_cap_bytes

    if board is None:
        return None
    cap_bytes = gpu_cap_bytes(board_named(board), found)
    if device == "cpu":
        raise InputError("--board caps a GPU's memory, but --device is cpu: use --device cuda")
    return cap_bytes


def _evaluation(given: tuple[str, ...]) -> dict[str, Path]:
    found = {}
    for one in given:
        name, equals, path = one.partition("=")
        if not equals or not name or not path:
            raise InputError(f"--eval is {one!r}, but has to be NAME=FILE.jsonl")
        found[name] = Path(path)
    return found
