"""The broker's address, which this file alone reads and prints.

    mqtt://host:port    mqtts://user:password@host:port?ca=file&cert=file&key=file

A password is never printed: messages show `***`.
"""

import re
import ssl
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

import msgspec

from edge_broker.errors import BrokerError

_PORTS = {"mqtt": 1883, "mqtts": 8883}


class Address(msgspec.Struct, frozen=True):
    """A broker's address, taken apart."""

    scheme: str  # mqtt, or mqtts with TLS
    host: str
    port: int
    user: str | None = None  # decoded, as the broker compares it
    password: str | None = None  # decoded
    # PEM files for mqtts: ca of the authority, cert of the client's certificate, key of its key
    files: dict[str, Path] = {}

    def __str__(self) -> str:
        """The address for messages: no files, and *** for a password."""
        user = f"{quote(self.user or '', safe='')}{':***' if self.password else ''}"
        return f"{self.scheme}://{user}{'@' if user else ''}{self._host_and_port()}"

    def __repr__(self) -> str:
        return f"Address({str(self)!r})"

    # rich prints a traceback's variables by this method, else by their fields
    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return [("address", str(self))]

    def without_credentials(self) -> str:
        """The URL with certificate files, without user and password: fit for a command line."""
        query = f"?{urlencode(self.files)}" if self.files else ""
        return f"{self.scheme}://{self._host_and_port()}{query}"

    def _host_and_port(self) -> str:
        return f"{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"

    def tls(self) -> ssl.SSLContext | None:
        """The TLS context, or None for mqtt://; BrokerError if a file is missing or has no key."""
        if self.scheme != "mqtts":
            return None
        try:
            context = ssl.create_default_context(cafile=self.files.get("ca"))
            if "cert" in self.files:
                context.load_cert_chain(self.files["cert"], self.files.get("key"))
        except OSError as error:  # ssl.SSLError is one
            files = ", ".join(f"{name}={path}" for name, path in self.files.items())
            raise BrokerError(f"cannot set up TLS for {self} with {files}: {error}") from error
        return context


def parse(url: str) -> Address:
    """Read a broker's URL.

    Raises:
        BrokerError: the URL has another form, or names files without TLS; no password is quoted.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    # the cause is dropped, because its text may quote the password
    except ValueError:
        raise _malformed(url) from None
    if parts.scheme not in _PORTS or not parts.hostname or port == 0:
        raise _malformed(url)
    if parts.path not in ("", "/") or parts.fragment:
        raise _malformed(url)
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    if query.keys() - {"ca", "cert", "key"}:
        raise BrokerError(f"the broker's address {redacted(url)} may have only ca, cert and key after '?'")
    if parts.scheme == "mqtt" and query:
        raise BrokerError(f"certificates are given for {redacted(url)}; they need mqtts://")
    return Address(
        scheme=parts.scheme,
        host=parts.hostname,
        port=_PORTS[parts.scheme] if port is None else port,
        user=unquote(parts.username) if parts.username else None,
        password=unquote(parts.password) if parts.password else None,
        files={name: Path(path) for name, path in query.items()},
    )


def redacted(url: str) -> str:
    """Any text that was given as a broker's URL, cut down to scheme, user, host and port.

    A malformed URL may hold its password anywhere: unencoded with / ? # or @ in it, or without a
    host after it. So everything between the first ':' and the last '@' is left out, and a port that
    is no number.
    """
    scheme = match[0] if (match := re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", url)) else ""
    user_info, at, place = url[len(scheme) :].rpartition("@")
    user, colon, _ = user_info.partition(":")
    host, port = re.findall(r"^(\[[0-9A-Fa-f:.]*\]|[^:/?#]*)(:[^/?#]*)?", place)[0]
    port = port if re.fullmatch(r"(:\d{1,5})?", port) else ":***"
    return f"{scheme}{user}{':***' if colon else ''}{at}{host}{port}"


def _malformed(url: str) -> BrokerError:
    hint = "; in a password write %2F for /, %3F for ?, %23 for #, %40 for @" if "@" in url else ""
    return BrokerError(
        f"the broker's address `{redacted(url)}` is not a URL of the form mqtt://host:port or mqtts://host:port, "
        f"with a port from 1 to 65535{hint}"
    )
