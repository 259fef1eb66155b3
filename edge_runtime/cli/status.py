"""`edge-runtime status`: a fleet as its broker knows it."""

import click
from edge_broker.address import Address

from edge_runtime.cli import options


@click.command("status")
@options.at_broker()
@click.option("--fleet", required=True, callback=options.topic_name, help="The fleet's name.")
@options.as_json
def command(broker: Address, fleet: str, json: bool) -> None:
    """Show a fleet's round and its devices.

    Presence, plan, memory and scores of each device, as the broker has them now.
    """
    from edge_runtime.cli import views
    from edge_runtime.protocol.status import read

    status = read(broker, fleet)
    click.echo(options.json_line(status)) if json else views.show_status(status)
