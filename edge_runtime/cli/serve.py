"""`edge-runtime serve`: what was learned behind OpenAI's interface."""

import logging
import re
from typing import TYPE_CHECKING, Any

import click

from edge_runtime.cli import options, served
from edge_runtime.errors import InputError

if TYPE_CHECKING:
    from edge_runtime.serving.event import ServerEvent

log = logging.getLogger(__name__)
ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s]+")


def _origins(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    """Values of --origin, as a browser writes them."""
    for value in values:
        if not ORIGIN.fullmatch(value.lower()):
            raise InputError(
                f"--origin is {value!r}, but has to be a page's scheme and host, such as http://localhost:3000, "
                "without a path"
            )
    return tuple(value.lower() for value in values)


@click.command("serve")
@served.base
@served.backend
@options.context
@options.parallel
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0 takes a free one."
)
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen at. Whoever reaches another one than a loopback address can use the model: there is "
    "no password.",
)
@click.option(
    "--origin",
    "origins",
    multiple=True,
    metavar="ORIGIN",
    callback=_origins,
    help="Web pages that may use the server, such as http://localhost:3000, and the name by which a proxy or a "
    "container is reached; may be given more than once. Pages of other sites are refused.",
)
@click.option("--attended", is_flag=True, hidden=True)
@options.as_json
def command(
    base: served.ServedBase,
    context: int,
    parallel: int,
    attended: bool,
    json: bool,
    **endpoint: Any,
) -> None:
    """Answer chats and completions as OpenAI's interface has them.

    With the base model and what was learned, at /v1/chat/completions and /v1/completions.
    """
    from edge_runtime.planning.processes import NOT_SERVING, installed
    from edge_runtime.serving.endpoint import LOOPBACK, Endpoint, bound
    from edge_runtime.state import stamp

    if not installed("starlette", "uvicorn"):
        raise InputError(NOT_SERVING)
    folder = base.folder()
    first = stamp(folder) if folder is not None else (0, 0)
    read, machine, where = base.read(), base.machine(), Endpoint(**endpoint)

    def tell(event: "ServerEvent") -> None:
        click.echo(options.json_line(event) if json else f"{event.phase}: {event.text}")

    # before the base is looked for and the backend imported, which takes seconds or, for a new base, more
    with bound(where) as listener:
        if where.host not in LOOPBACK:
            log.warning("whoever reaches %s can use the model: the server asks for no password", where.host)
        facts, learned = base.on_base(read, quiet=attended)
        if not attended:  # an agent takes the last line on standard error for the reason of the end
            base.tell_loading(facts)
        with base.imports():
            from edge_runtime.serving.process import ServedModel, serve

        model = ServedModel(facts, learned, folder, first, base.weights, base.backend, context, parallel)
        serve(model, where, listener, machine, tell, attended=attended)
