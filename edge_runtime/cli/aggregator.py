"""`edge-runtime aggregator`: a fleet's node."""

from pathlib import Path
from typing import TYPE_CHECKING

import click
from edge_broker.address import Address

from edge_runtime.cli import options

if TYPE_CHECKING:
    from edge_runtime.aggregator.node import NodeEvent


@click.command("aggregator")
@options.fleet_file
@click.option(
    "--state",
    type=options.PATH,
    required=True,
    help="Folder for rounds, updates and global versions; give the same one to continue.",
)
@options.at_broker()
@click.option(
    "--node", default="node", show_default=True, callback=options.topic_name, help="The node's name."
)
@click.option("--until-finished", is_flag=True, help="End when the last round is merged and reported.")
@options.as_json
def command(fleet: Path, state: Path, broker: Address, node: str, until_finished: bool, json: bool) -> None:
    """Run a fleet's node.

    The node announces rounds, receives and merges deltas, and publishes the global versions.
    """
    from edge_runtime import settings
    from edge_runtime.aggregator.node import Node, NodeOptions
    from edge_runtime.state import alone

    def tell(event: "NodeEvent") -> None:
        click.echo(options.json_line(event) if json else _line(event))

    fleet_settings = settings.load(fleet)
    with alone(state):
        Node(fleet_settings, NodeOptions(broker, state.resolve(), node, until_finished), tell).run()


def _line(event: "NodeEvent") -> str:
    """An event of the node for a person."""
    text = f": {event.text}" if event.text else ""
    missing = f"; missing: {', '.join(event.missing)}" if event.missing else ""
    return f"round {event.round}: {event.phase}{text}; in: {', '.join(event.in_) or 'nobody'}{missing}"
