"""`edge-runtime status`: a fleet as its broker knows it."""

from typing import TYPE_CHECKING

import click

from edge_runtime.cli import options
from edge_runtime.cli.output import say_json

if TYPE_CHECKING:
    from edge_broker.address import Address


@click.command("status")
@options.at_broker()
@click.option("--fleet", required=True, callback=options.topic_name, help="The fleet's name.")
@options.as_json
def command(broker: "Address", fleet: str, json: bool) -> None:
    """Show a fleet's round and its devices.

    Presence, plan, memory and scores of each device, as the broker has them now.
    """
    from edge_runtime.cli import views
    from edge_runtime.protocol.status import read

    status = read(broker, fleet)
    say_json(status) if json else views.show_status(status)
