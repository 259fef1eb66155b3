"""Options that several commands share, and how their values are read."""

import functools
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_runtime.errors import InputError

if TYPE_CHECKING:
    from edge_broker.address import Address

log = logging.getLogger(__name__)
LOCAL_BROKER = "mqtt://127.0.0.1:1883"


def at_broker(default: str | None = LOCAL_BROKER) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options --broker and --credentials; it gets `broker`: an Address, or None without a URL."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @click.option(
            "--broker",
            metavar="URL",
            default=default,
            show_default=True,
            help="The MQTT broker: mqtt://host:port, or mqtts://host:port?ca=FILE.",
        )
        @click.option(
            "--credentials",
            metavar="FILE",
            type=click.Path(path_type=Path),
            help="File with the broker's user and password, two lines of TOML, of mode 600; default: the "
            "variables EDGE_RUNTIME_BROKER_USER and EDGE_RUNTIME_BROKER_PASSWORD, if set.",
        )
        @functools.wraps(command)
        def with_address(*, broker: str | None, credentials: Path | None, **values: Any) -> None:
            command(broker=None if broker is None else _address(broker, credentials), **values)

        return with_address

    return decorate


def _address(url: str, credentials_file: Path | None) -> "Address":
    """The broker's address with its credentials, refused here if it cannot be used: before a state is made."""
    from edge_broker import address, credentials
    from edge_broker.errors import LinkError as BrokerError

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
