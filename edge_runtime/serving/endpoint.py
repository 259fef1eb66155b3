"""Where a server listens, and the socket that takes the place before a model is loaded."""

import re
import socket
from typing import NamedTuple

from edge_runtime.errors import InputError

LOOPBACK = ("localhost", "127.0.0.1", "::1")


class Endpoint(NamedTuple):
    """Where a server listens."""

    host: str  # a loopback address, unless others may use the server
    port: int  # 0: a free one
    origins: tuple[str, ...] = ()  # of web pages that may ask

    def __str__(self) -> str:
        """host:port, or [host]:port, as in a URL."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def on_loopback(text: str) -> Endpoint:
    """The endpoint of PORT or HOST:PORT, an IPv6 address in brackets.

    Raises:
        InputError: it is none, or the host is not the loopback.
    """
    host, _, port = text.rpartition(":")
    hosts = {"": "127.0.0.1", "127.0.0.1": "127.0.0.1", "localhost": "localhost", "[::1]": "::1"}
    if host not in hosts or not re.fullmatch(r"[0-9]{1,5}", port) or not 1 <= int(port) <= 65535:
        raise InputError(
            f"{text!r} is no port of the loopback, such as 8080 or [::1]:8080; to listen elsewhere, run `edge-runtime serve` "
            "with --state and --host"
        )
    return Endpoint(hosts[host], int(port))


def bound(endpoint: Endpoint) -> socket.socket:
    """A socket that has the port and does not listen yet; raises InputError where there is none."""
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(
            endpoint.host, endpoint.port, type=socket.SOCK_STREAM
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
    except (OSError, OverflowError, UnicodeError) as error:
        raise unavailable(endpoint, error) from error
    return listener


def unavailable(endpoint: Endpoint, error: Exception) -> InputError:
    """What to tell of an endpoint at which nobody can listen."""
    return InputError(f"cannot listen at {endpoint}: {error}; choose another port, or another address")
