"""Options that several commands share, and how their values are read."""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import edge_profiles
import msgspec
from edge_broker import address, credentials, topics
from edge_broker.errors import BrokerError

from edge_runtime.errors import InputError

if TYPE_CHECKING:
    from edge_runtime.models.facts import Facts

log = logging.getLogger(__name__)
LOCAL_BROKER = "mqtt://127.0.0.1:1883"
PATH = click.Path(path_type=Path)
Command = Callable[..., Any]

as_json = click.option("--json", "json", is_flag=True, help="Print JSON instead of text.")
fleet_file = click.option(
    "--fleet", type=PATH, required=True, help="The fleet file (TOML); docs/fleet.md describes it."
)
budget = click.option(
    "--budget",
    metavar="SIZE",
    help="Peak memory of the trainer, such as 900MiB; default: most of the free memory "
    "(device_profiles/README.md has the rule).",
)
board = click.option(
    "--board",
    metavar="NAME",
    help="Cap the trainer's GPU memory to that of a smaller board, such as jetson-orin-nano-8gb.",
)
models = click.option(
    "--models", type=PATH, default=Path(), help="Folder for relative paths of the catalog; default: this one."
)
device = click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="What computes; auto takes a GPU, if there is one.",
)

context = click.option(
    "--context",
    type=click.IntRange(8),
    default=2048,
    show_default=True,
    help="Tokens of a prompt and its answer together; less where the model has fewer positions.",
)
parallel = click.option(
    "--parallel",
    type=click.IntRange(1, 64),
    default=2,
    show_default=True,
    help="Answers that are written at once; each takes memory for a whole context.",
)


def topic_name(_context: click.Context, option: click.Parameter, name: str) -> str:
    """A click callback that raises InputError where the name cannot be part of a topic."""
    try:
        return topics.name(option.opts[0], name)
    except BrokerError as error:
        raise InputError(str(error)) from None


def at_broker(default: str | None = LOCAL_BROKER) -> Callable[[Command], Command]:
    """Add --broker and --credentials; the command gets `broker`, an Address; None without a URL."""
    url = click.option(
        "--broker",
        metavar="URL",
        default=default,
        show_default=True,
        callback=_address,
        help="The MQTT broker: mqtt://host:port, or mqtts://host:port?ca=FILE.",
    )
    file = click.option(
        "--credentials",
        metavar="FILE",
        type=PATH,
        is_eager=True,  # read before the URL, which it completes
        help="File with the broker's user and password, two lines of TOML, of mode 600; default: the "
        "variables EDGE_RUNTIME_BROKER_USER and EDGE_RUNTIME_BROKER_PASSWORD, if set.",
    )
    return lambda command: url(file(command))


def _address(context: click.Context, _option: click.Parameter, url: str | None) -> address.Address | None:
    """The broker's address with its credentials, checked before a state folder is made."""
    credentials_file = context.params.pop("credentials")
    if url is None:
        return None
    try:
        parsed = address.parse(url)
        if parsed.password is not None:
            log.warning(
                "every user of this machine can read the password in --broker: use --credentials FILE"
            )
        broker = credentials.complete(parsed, credentials_file, os.environ)
        broker.tls()
    except BrokerError as error:
        raise InputError(str(error)) from None
    return broker


def budget_bytes(size: str | None, board: str | None, profile: edge_profiles.Profile) -> int:
    """The value of --budget, or the default budget of the board or of this machine."""
    if size:
        return edge_profiles.parse_size(size)
    if board:
        profile = edge_profiles.profile_of(edge_profiles.board(board))
    return edge_profiles.default_budget_bytes(profile)


def trainer_device(device: str, profile: edge_profiles.Profile) -> str:
    """The value of --device as cpu or cuda; raises InputError for cuda without a GPU."""
    if device == "cuda" and profile.gpu is None:
        raise InputError("--device is cuda, but no GPU was found: `edge-runtime profile` shows what is there")
    return ("cuda" if profile.gpu else "cpu") if device == "auto" else device


def gpu_cap_bytes(board: str | None, device: str, profile: edge_profiles.Profile) -> int | None:
    """GPU memory that --board leaves the trainer, or None; raises InputError with --device cpu."""
    if board is None:
        return None
    cap_bytes = edge_profiles.gpu_cap_bytes(edge_profiles.board(board), profile)
    if device == "cpu":
        raise InputError("--board caps a GPU's memory, but --device is cpu: use --device cuda")
    return cap_bytes


def json_line(value: Any) -> str:
    """What --json prints of a value: one line, in ASCII, which every terminal and every reader takes."""
    return json.dumps(msgspec.to_builtins(value, str_keys=True), separators=(",", ":"))


def tell(text: str) -> None:
    """Say on standard error what a command is at, as its next stage may take minutes."""
    click.echo(text, err=True)


def facts_of(source: str, models: Path) -> "Facts":
    """The facts of a model, after a word on standard error: a new one takes minutes.

    Raises InputError as `processes.prepared` does.
    """
    from edge_runtime.planning import processes

    tell(f"reading the model {source}")
    return processes.prepared(source, models)
