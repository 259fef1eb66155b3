"""The command `edge-runtime`: options and output; what is done is done elsewhere, and imported where it is needed.

Exit codes: 0 done, 1 the result is not good, 2 bad input, 3 no broker or fleet, 4 no plan fits, 5 the trainer failed.
"""

import logging
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from edge_runtime.errors import EdgeError, InputError, LinkError

if TYPE_CHECKING:
    from edge_profiles import Profile

app = typer.Typer(
    name="edge-runtime",
    help="Unequal devices fine-tune language models on their own data and learn from each other over MQTT.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Broker = Annotated[
    str, typer.Option(help="The MQTT broker: mqtt://host:port, or mqtts://user:password@host:port?ca=FILE.")
]
FleetFile = Annotated[Path, typer.Option("--fleet", help="The fleet file (TOML); docs/fleet.md describes it.")]
Budget = Annotated[
    str | None, typer.Option(help="Memory the trainer may take, such as 900MiB; default: most of what is free.")
]
Models = Annotated[Path | None, typer.Option(help="Folder in which relative paths of the catalog are looked for.")]
LOCAL_BROKER = "mqtt://127.0.0.1:1883"


@app.command()
def profile(json: Json = False) -> None:
    """Show this device as the planner sees it: cores, memory, GPU, board, and what the runtime itself takes."""
    from edge_runtime import views

    found = _probe()
    values = {**msgspec.to_builtins(found), "runtime_baseline_bytes": _runtime_bytes()}
    views.show_profile(values) if not json else _print(values)


@app.command()
def plan(
    fleet: FleetFile,
    budget: Budget = None,
    board: Annotated[
        str | None, typer.Option(help="Plan for a board one does not have, such as jetson-orin-nano-8gb.")
    ] = None,
    models: Models = None,
    json: Json = False,
) -> None:
    """Show which model of a fleet's catalog this device, or a board, would train, and why no larger one."""
    from edge_profiles import board as board_named
    from edge_profiles import default_budget_bytes, profile_of

    from edge_runtime import processes, settings, views
    from edge_runtime.planning.search import choose

    wanted = settings.load(fleet)
    device = profile_of(board_named(board)) if board else _probe()
    budget_bytes = _size(budget) if budget else default_budget_bytes(device)
    facts = {one.source: processes.prepared(one.source, models or Path.cwd()) for one in wanted.catalog}
    choice = choose(wanted, facts, budget_bytes, processes.runtime_bytes())
    views.show_plan(choice, budget_bytes) if not json else _print(views.plan_values(choice, budget_bytes))


@app.command()
def broker(
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 1883,
    state: Annotated[Path, typer.Option(help="Where its configuration and log are kept.")] = Path("broker-state"),
    kind: Annotated[str, typer.Option(help="auto, mosquitto or embedded.")] = "auto",
) -> None:
    """Run a broker on this machine's loopback: Mosquitto if it is installed, else the embedded one."""
    from edge_broker.local import start_broker

    running = start_broker(port=port, state_dir=state, kind=kind)
    _say(f"{running.kind} listens at {running.url}; stop it with Ctrl-C")
    try:
        signal.sigwait({signal.SIGINT, signal.SIGTERM})
    finally:
        running.stop()


@app.command()
def aggregator(
    fleet: FleetFile,
    state: Annotated[
        Path, typer.Option(help="Folder for rounds, updates and global versions; give the same one to go on.")
    ],
    broker: Broker = LOCAL_BROKER,
    node: Annotated[str, typer.Option(help="This node's name.")] = "node",
    until_finished: Annotated[bool, typer.Option(help="End when the last round is merged and reported.")] = False,
    noop: Annotated[bool, typer.Option(hidden=True)] = False,
    json: Json = False,
) -> None:
    """Run a fleet: announce its rounds, take in the devices' deltas, merge them, publish the global versions."""
    from edge_runtime import settings
    from edge_runtime.aggregator.node import Event, Node, Options

    def tell(event: Event) -> None:
        there = f"; in: {', '.join(event.in_) or 'nobody'}" + (
            f"; missing: {', '.join(event.missing)}" if event.missing else ""
        )
        text = f": {event.text}" if event.text else ""
        _print(event) if json else _say(f"round {event.round}: {event.phase}{text}{there}")

    Node(settings.load(fleet), Options(broker, state, node, until_finished, noop), tell).run()


@app.command()
def agent(
    fleet: Annotated[str, typer.Option(help="The fleet's name, as its fleet file has it.")],
    id: Annotated[str, typer.Option(help="This device's name, unique in the fleet.")],
    data: Annotated[Path, typer.Option(help="This device's rows, one JSON object a line; they never leave it.")],
    state: Annotated[Path, typer.Option(help="Folder for keys, adapters and work; give the same one to go on.")],
    broker: Broker = LOCAL_BROKER,
    budget: Budget = None,
    evaluation: Annotated[
        list[str] | None, typer.Option("--eval", help="Held-out rows as NAME=FILE.jsonl; default: a tenth of the data.")
    ] = None,
    models: Models = None,
    threads: Annotated[int, typer.Option(help="CPU threads of the trainer; 0 for all cores.")] = 0,
    wait: Annotated[float, typer.Option(help="Seconds to wait for the fleet's first round.")] = 120.0,
    until_finished: Annotated[bool, typer.Option(help="End when the fleet has finished.")] = False,
    noop: Annotated[str | None, typer.Option(hidden=True)] = None,
    json: Json = False,
) -> None:
    """Take part in a fleet from this device: everything but its data comes from the fleet's node."""
    from edge_profiles import default_budget_bytes

    from edge_runtime.agent.agent import Agent, Event, Options

    found = _probe()
    options = Options(
        broker=broker,
        fleet=fleet,
        id=id,
        data=data,
        state=state,
        budget_bytes=_size(budget) if budget else default_budget_bytes(found),
        evaluation=_evaluation(evaluation or []),
        models=models or Path.cwd(),
        threads=threads,
        device="cuda" if found.gpu else "cpu",
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
        memory = f", {event.memory_bytes >> 20} of {event.budget_bytes >> 20} MiB" if event.memory_bytes else ""
        _say(
            f"{event.device}, round {event.round}: {event.phase}{step}{loss}{memory}"
            + (f": {event.text}" if event.text else "")
        )

    Agent(options, tell).run()


@app.command()
def status(
    fleet: Annotated[str, typer.Option(help="The fleet's name.")], broker: Broker = LOCAL_BROKER, json: Json = False
) -> None:
    """Show a fleet's round, and each device's presence, plan, memory and scores, as the broker has them now."""
    from edge_runtime import status as status_
    from edge_runtime import views

    seen = status_.read(broker, fleet)
    views.show_status(seen) if not json else _print(seen)


@app.command()
def demo(
    method: Annotated[str, typer.Option(help="fedit, or local as the control.")] = "fedit",
    broker: Annotated[str | None, typer.Option(help="Use a broker that already runs.")] = None,
    keep: Annotated[Path | None, typer.Option(help="Keep state, logs and adapters in this folder.")] = None,
    json: Annotated[Path | None, typer.Option("--json", help="Write the result to this file.")] = None,
) -> None:
    """Run a whole fleet on this machine: a broker, an aggregator and three agents, on a real model."""
    from edge_runtime import views
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
    try:
        app()
    except EdgeError as error:
        _fail(str(error), error.exit_code)
    except ProfileError as error:
        _fail(str(error), InputError.exit_code)
    except BrokerError as error:
        _fail(str(error), LinkError.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


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
    from importlib.util import find_spec

    from edge_runtime import processes

    return processes.runtime_bytes() if find_spec("torch") and find_spec("transformers") else None


def _size(text: str) -> int:
    from edge_profiles import parse_size

    return parse_size(text)


def _evaluation(given: list[str]) -> dict[str, Path]:
    found = {}
    for one in given:
        name, equals, path = one.partition("=")
        if not equals or not name or not path:
            raise InputError(f"--eval is {one!r}, but has to be NAME=FILE.jsonl")
        found[name] = Path(path)
    return found


if __name__ == "__main__":
    main()
