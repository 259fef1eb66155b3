"""Refuses what pages of other web sites ask: a browser sends their requests to this machine too.

    Host      the name in the request's address. A site can let its own name lead to this machine
              (DNS rebinding), so a name has to be known. No site can do so with an IP address.
    Origin    the page's site, which a browser adds to each POST. It has to be the Host, or allowed.

Programs that are no browsers send no Origin.
Source: https://fetch.spec.whatwg.org/#origin-header
"""

import ipaddress
import re
import socket

import msgspec
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from edge_runtime.serving.openai import RequestError

HOST = re.compile(r"\[?(?P<name>[^\[\]]*?)\]?(:\d+)?")  # name:port or [address]:port


class KnownOrigin:
    """Middleware of the interface."""

    def __init__(self, app: ASGIApp, host: str, origins: tuple[str, ...]) -> None:
        """Allow programs, the server's own pages, and some others.

        Args:
            app: answers what is not refused.
            host: at which the server listens.
            origins: of pages that may ask, such as http://chat.example:3000; their hosts are names
                of the server too, as behind a proxy.
        """
        machine = socket.gethostname()
        names = [
            "localhost",
            host,
            machine,
            f"{machine}.local",
            *(each.partition("://")[2] for each in origins),
        ]
        self._app, self._origins = app, origins
        self._names = {_name(name) for name in names}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or refuse with status 403."""
        app, reason = self._app, self._refusal(Headers(scope=scope)) if scope["type"] == "http" else None
        if reason is not None:
            body = msgspec.json.encode(RequestError(403, reason).body())
            app = Response(body, 403, media_type="application/json")
        await app(scope, receive, send)

    def _refusal(self, headers: Headers) -> str | None:
        """Why a request is refused; a site's page may read this, so it tells nothing of the server."""
        host, origin = headers.get("host"), headers.get("origin")
        # HTTP 1.0 has requests without a Host, and no browser sends them
        if host is not None and not self._knows(_name(host)):
            return (
                f"the request is for the host `{host[:80]}`, which is not known as a name of this server: ask it under "
                "localhost or an IP address, or start it as `edge-runtime serve --origin http://NAME:PORT` with that name"
            )
        if origin is None or origin in self._origins or origin.partition("://")[2] == host:
            return None
        return (
            f"the request comes from a page of `{origin[:80]}`, which may not use this server: to allow its pages, "
            "start the server as `edge-runtime serve --origin ORIGIN`"
        )

    def _knows(self, name: str) -> bool:
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in self._names
        return True


def _name(host: str) -> str:
    """The name or address in a Host header, without its port."""
    match = HOST.fullmatch(host.lower())
    return match["name"] if match else ""
