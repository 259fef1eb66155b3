"""A node that takes any payload and sends the last one back: the real aggregator over the real link, without merging.

    python -m benchmarks.noise_node --fleet FILE --state DIR --broker URL [--until-finished]

For the devices of benchmarks.noise. Events are lines of JSON, as those of `edge-runtime aggregator --json`.
"""

import argparse
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

import click
import msgspec
from edge_broker import address
from edge_broker.journal import Update

from edge_runtime import settings
from edge_runtime.agent.options import DeviceEvent
from edge_runtime.aggregator.check import Shapes
from edge_runtime.aggregator.node import Exchange, Node, NodeEvent, NodeOptions
from edge_runtime.aggregator.publish import chain_before
from edge_runtime.aggregator.store import Version
from edge_runtime.errors import EdgeError
from edge_runtime.methods.interface import Method, Tensors
from edge_runtime.state import alone

NOISE = "noise"  # the model class


def tell(event: DeviceEvent | NodeEvent) -> None:
    """Print an event as one line of JSON."""
    click.echo(msgspec.json.encode(event))


def check(payload: bytes, expected: Shapes, fleet: settings.Fleet, method: Method) -> Tensors:
    """Accept any payload."""
    return {}


def merge(
    updates: list[Update],
    versions: Mapping[str, Version],
    fleet: settings.Fleet,
    method: Method,
    round_: int,
    folder: Path,
) -> list[Version]:
    """The last update's payload, added to the chain of all devices."""
    folder.mkdir(parents=True, exist_ok=True)
    version = folder / f"{round_:05d}-{NOISE}"
    version.write_bytes(updates[-1].payload.read_bytes())  # the journal deletes its own file
    return [Version(NOISE, version, (*chain_before(versions.get(NOISE)), version))]


def main() -> int:
    """Serve a fleet; the exit codes are those of `edge-runtime aggregator`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.noise_node")
    for name in ("fleet", "state", "broker"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--until-finished", action="store_true")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    state = Path(arguments.state).resolve()
    options = NodeOptions(address.parse(arguments.broker), state, "node", arguments.until_finished)
    try:
        fleet = settings.load(Path(arguments.fleet))
        with alone(state):
            Node(fleet, options, tell, Exchange(check, merge)).run()
    except EdgeError as error:
        sys.stderr.write(f"edge-runtime: {error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
