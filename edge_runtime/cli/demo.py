"""`edge-runtime demo`: a whole fleet on one machine."""

from pathlib import Path

import click
import msgspec
from edge_broker.address import Address

from edge_runtime.cli.options import PATH, at_broker
from edge_runtime.errors import EdgeError


@click.command("demo")
@click.option(
    "--method",
    default="fedit",
    show_default=True,
    help="As in [method] of a fleet file; local is the control.",
)
@at_broker(default=None)
@click.option("--keep", type=PATH, help="Keep state, logs and adapters in this folder.")
@click.option("--json", "json", type=PATH, help="Write the result to this file.")
def command(method: str, broker: Address | None, keep: Path | None, json: Path | None) -> None:
    """Run a whole fleet on this machine.

    A broker (without --broker), an aggregator and three agents, each a process, on a real model.
    """
    from edge_runtime.cli import views
    from edge_runtime.demo.run import run

    outcome = run(method, broker, keep)
    views.show_demo(outcome)
    if json:
        json.write_bytes(msgspec.json.format(msgspec.json.encode(outcome), indent=2) + b"\n")
    if outcome.faults:
        raise EdgeError("; ".join(outcome.faults))
