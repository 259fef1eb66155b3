"""`edge-runtime broker`: a broker on this machine, for trying things out."""

import signal
from pathlib import Path

import click

from edge_runtime.cli import options


@click.command("broker")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=1883,
    show_default=True,
    help="Port to listen on; 0 takes a free one.",
)
@click.option(
    "--state",
    type=options.PATH,
    default=Path("broker-state"),
    show_default=True,
    help="Folder for its configuration and log.",
)
@click.option(
    "--kind", type=click.Choice(["auto", "mosquitto", "embedded"]), default="auto", show_default=True
)
@options.as_json
def command(port: int, state: Path, kind: str, json: bool) -> None:
    """Run a broker on this machine's loopback.

    Mosquitto if it is installed, else an embedded one. For a fleet's broker see broker/README.md.
    """
    from edge_broker.local import start_broker

    with start_broker(port=port, state_dir=state, kind=kind) as running:
        listening = {"kind": running.kind, "url": running.url}
        text = f"{running.kind} listens at {running.url}; stop it with Ctrl-C"
        click.echo(options.json_line(listening) if json else text)
        # Both signals end the broker with exit code 0: it has nothing to lose.
        signal.sigwait({signal.SIGINT, signal.SIGTERM})
