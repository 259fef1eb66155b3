"""Where the broker is: mqtt://host:port or mqtts://user:password@host:port?ca=file&cert=file&key=file."""

import ssl
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit

import msgspec

from edge_broker.errors import LinkError

_PORTS = {"mqtt": 1883, "mqtts": 8883}
_FILES = ("ca", "cert", "key")


class Address(msgspec.Struct, frozen=True):
    """A broker's address, taken apart; ca, cert and key are files and only for mqtts."""

    scheme: str
    host: str
    port: int
    user: str | None = None
    password: str | None = None
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None

    def __str__(self) -> str:
        """The address without its secrets, for messages."""
        return f"{self.scheme}://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"

    def tls(self) -> ssl.SSLContext | None:
        """The TLS context, or None for mqtt://.

        Raises:
            LinkError: a file is missing or holds no certificate or key.
        """
        if self.scheme != "mqtts":
            return None
        try:
            context = ssl.create_default_context(cafile=self.ca)
            if self.cert:
                context.load_cert_chain(self.cert, self.key)
        except OSError as error:  # ssl.SSLError is one
            files = ", ".join(f"{name}={path}" for name in _FILES if (path := getattr(self, name)))
            raise LinkError(f"cannot set up TLS for {self} with {files}: {error}") from error
        return context


def parse(url: str, *, ca: Path | None = None, cert: Path | None = None, key: Path | None = None) -> Address:
    """Read a broker's URL; files given as arguments win over those in the URL.

    Raises:
        LinkError: it is not such a URL, or names files without TLS.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise LinkError(
            f"the broker's address is not a URL: {error}; it needs the form mqtt://host:port"
        ) from None
    if parts.scheme not in _PORTS or not parts.hostname or parts.path not in ("", "/"):
        shown = f"{parts.scheme}://{parts.hostname or ''}{parts.path}"  # never the password
        raise LinkError(
            f"the broker's address is {shown!r}; it needs the form mqtt://host:port or mqtts://host:port"
        )
    query = dict(parse_qsl(parts.query))
    if unknown := sorted(set(query) - set(_FILES)):
        raise LinkError(
            f"the broker's address has {', '.join(unknown)} after '?'; only ca, cert and key are known"
        )
    files = {name: Path(query[name]) if name in query else None for name in _FILES}
    files |= {name: path for name, path in (("ca", ca), ("cert", cert), ("key", key)) if path}
    if parts.scheme == "mqtt" and any(files.values()):
        raise LinkError(f"certificates are given for {parts.scheme}://{parts.hostname}; they need mqtts://")
    return Address(
        scheme=parts.scheme,
        host=parts.hostname,
        port=_PORTS[parts.scheme] if port is None else port,
        user=unquote(parts.username) if parts.username else None,
        password=unquote(parts.password) if parts.password else None,
        ca=files["ca"],
        cert=files["cert"],
        key=files["key"],
    )
