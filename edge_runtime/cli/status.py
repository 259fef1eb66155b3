"""`edge-runtime status`: a fleet as its broker knows it."""

import click
from edge_broker.address import Address

from edge_runtime.cli import options


@click.command("status")
@options.at_broker()
@click.option("--fleet", required=True, callback=options.topic_name, help="The fleet's name.")
@click.option("--forget", metavar="ID", help="Take a device that will not come back off the broker.")
@options.as_json
def command(broker: Address, fleet: str, forget: str | None, json: bool) -> None:
    """Show a fleet's round and its devices.

    Presence, plan, memory and scores of each device, as the broker has them now.
    """
    from edge_runtime.cli import views
    from edge_runtime.protocol import status as fleet_status

    status = fleet_status.read(broker, fleet)
    if forget is not None:
        status = fleet_status.forget(broker, status, forget)
    click.echo(options.json_line(status)) if json else views.show_status(status)
