"""`edge-runtime agent`: a device of a fleet."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import edge_profiles

from edge_runtime.cli import options
from edge_runtime.errors import EdgeError, InputError

if TYPE_CHECKING:
    from edge_runtime.agent.options import DeviceEvent
    from edge_runtime.serving.endpoint import Endpoint


@click.command("agent")
@options.at_broker()
@click.option(
    "--fleet", required=True, callback=options.topic_name, help="The fleet's name, as in its fleet file."
)
@click.option(
    "--id", required=True, callback=options.topic_name, help="This device's name, unique in the fleet."
)
@click.option(
    "--data",
    type=options.PATH,
    required=True,
    help="This device's rows, one JSON object a line; they never leave it.",
)
@click.option(
    "--state",
    type=options.PATH,
    required=True,
    help="Folder for keys, adapters and work; give the same one to continue.",
)
@options.budget
@click.option(
    "--eval",
    "evaluation",
    multiple=True,
    metavar="NAME=FILE",
    help="Held-out rows, such as own=rows.jsonl; may be given more than once; default: a tenth of the data.",
)
@options.models
@click.option(
    "--threads",
    type=click.IntRange(0),
    default=0,
    help="CPU threads of the trainer; default: 0, which is all cores.",
)
@options.device
@options.board
@click.option("--wait", default=120.0, show_default=True, help="Seconds to wait for the fleet's first round.")
@click.option("--until-finished", is_flag=True, help="End when the fleet has finished.")
@click.option(
    "--serve",
    metavar="[HOST:]PORT",
    help="Answer with the newest version on this port of the loopback, in a process of its own whose memory counts "
    "towards the budget (docs/serve.md). HOST is 127.0.0.1, localhost or [::1].",
)
@options.context
@options.parallel
@click.option(
    "--on-version",
    metavar="COMMAND",
    help="Run a command after each new version, with the folder of what was learned as its last argument.",
)
@options.as_json
def command(
    state: Path,
    evaluation: tuple[str, ...],
    device: str,
    board: str | None,
    budget: str | None,
    wait: float,
    serve: str | None,
    context: int,
    parallel: int,
    on_version: str | None,
    json: bool,
    **values: Any,
) -> None:
    """Take part in a fleet from this device.

    The device brings its data; everything else comes from the fleet's node.
    """
    from edge_runtime.agent.agent import run
    from edge_runtime.agent.hook import words
    from edge_runtime.agent.options import DeviceOptions, ServeOptions
    from edge_runtime.planning.predict import Serving
    from edge_runtime.planning.processes import NOT_SERVING, installed
    from edge_runtime.state import alone

    # Also refuses nan, with which every comparison is false.
    if not 0 < wait < float("inf"):
        raise InputError(f"--wait is {wait:g}, but has to be seconds, more than 0")
    held_out = {}
    for pair in evaluation:
        name, _, path = pair.partition("=")
        if not name or not path:
            raise InputError(f"--eval is {pair!r}, but has to be NAME=FILE.jsonl")
        held_out[name] = Path(path)
    endpoint = None if serve is None else _free(serve)
    if endpoint is not None and not installed("starlette", "uvicorn"):
        raise InputError(NOT_SERVING)
    profile = edge_profiles.probe()
    device_options = DeviceOptions(
        state=state.resolve(),
        gpu_cap_bytes=options.gpu_cap_bytes(board, device, profile),
        budget_bytes=options.budget_bytes(budget, board, profile),
        evaluation=held_out,
        device=options.trainer_device(device, profile),
        wait_s=wait,
        serve=None if endpoint is None else ServeOptions(endpoint, Serving(context, parallel)),
        on_version=None if on_version is None else words(on_version),
        **values,
    )

    def tell(event: "DeviceEvent") -> None:
        click.echo(options.json_line(event) if json else _line(event))

    with alone(state):
        run(device_options, tell)


def _free(serve: str) -> "Endpoint":
    """The value of --serve, at which nobody listens yet.

    Raises:
        InputError: it is no port of the loopback.
        EdgeError: the port is taken. A service tries that again, as the server of an agent that was
            killed ends after its last answer.
    """
    from edge_runtime.serving.endpoint import bound, on_loopback

    endpoint = on_loopback(serve)
    try:
        bound(endpoint).close()
    except InputError as error:
        raise EdgeError(f"--serve: {error}") from error
    return endpoint


def _line(event: "DeviceEvent") -> str:
    """An event of an agent for a person."""
    step = f" {event.step}/{event.steps}" if event.steps else ""
    loss = f", loss {event.loss:.3f}" if event.loss is not None else ""
    memory = f", {event.memory_bytes >> 20} of {event.budget_bytes >> 20} MiB" if event.memory_bytes else ""
    text = f": {event.text}" if event.text else ""
    return f"{event.device}, round {event.round}: {event.phase}{step}{loss}{memory}{text}"
