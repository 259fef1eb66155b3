"""Every topic of the link, built and parsed in one place.

    edge/1/<fleet>/round                           retained, signed
    edge/1/<fleet>/device/<id>/presence            retained
    edge/1/<fleet>/device/<id>/inbox/<transfer>    to the device: grant, pause, receipt, reject
    edge/1/<fleet>/device/<id>/report
    edge/1/<fleet>/offer/<id>                      signed manifest
    edge/1/<fleet>/node/<node>/up/<id>/<transfer>  chunks of an update
    edge/1/<fleet>/want/<id>                       chunks a device still misses
    edge/1/<fleet>/artifact/<digest>/<n>           chunks of a global adapter

The 1 is the version of this layout. No topic has more than 7 slashes, the limit of AWS IoT Core.
"""

import hashlib
import re

import msgspec

from edge_broker.errors import BadMessage, BrokerError

_ROOT = "edge/1"
_NAME = re.compile(r"(?!\.{1,2}\Z)[A-Za-z0-9._-]{1,64}")  # also names a file: neither . nor ..
_DIGEST = re.compile(r"[0-9a-f]{64}")
_LAYOUT = {  # parts after the fleet; <…> names a field of Topic
    "round": ("round",),
    "presence": ("device", "<device>", "presence"),
    "inbox": ("device", "<device>", "inbox", "<transfer>"),
    "report": ("device", "<device>", "report"),
    "offer": ("offer", "<device>"),
    "up": ("node", "<node>", "up", "<device>", "<transfer>"),
    "want": ("want", "<device>"),
    "artifact": ("artifact", "<digest>", "<chunk>"),
}


class Topic(msgspec.Struct, frozen=True):
    """A parsed topic; fields that its kind does not have are empty."""

    kind: str  # round, presence, inbox, report, offer, up, want or artifact
    fleet: str
    device: str = ""
    node: str = ""
    transfer: str = ""
    digest: str = ""
    chunk: int = -1


def round(fleet: str) -> str:
    """The retained, signed announcement of the fleet's round."""
    return _build("round", fleet)


def presence(fleet: str, device: str) -> str:
    """The retained presence of a device."""
    return _build("presence", fleet, device=device)


def inbox(fleet: str, device: str, transfer: str) -> str:
    """What the node tells a device about one transfer."""
    return _build("inbox", fleet, device=device, transfer=transfer)


def report(fleet: str, device: str) -> str:
    """A device's measurements of a round."""
    return _build("report", fleet, device=device)


def offer(fleet: str, device: str) -> str:
    """A device's signed manifests."""
    return _build("offer", fleet, device=device)


def up(fleet: str, node: str, device: str, transfer: str) -> str:
    """The chunks of one transfer, to the node that granted it."""
    return _build("up", fleet, node=node, device=device, transfer=transfer)


def want(fleet: str, device: str) -> str:
    """Which chunks of an artifact a device still misses."""
    return _build("want", fleet, device=device)


def artifact(fleet: str, digest: str, chunk: int) -> str:
    """One chunk of an artifact."""
    return _build("artifact", fleet, digest=digest, chunk=str(chunk))


# --- filters to subscribe to


def all_rounds() -> str:
    """The round of every fleet on the broker."""
    return f"{_ROOT}/+/round"


def all_presence(fleet: str) -> str:
    """The presence of every device."""
    return presence(fleet, "+")


def all_inbox(fleet: str, device: str) -> str:
    """Everything nodes tell one device."""
    return inbox(fleet, device, "+")


def all_reports(fleet: str) -> str:
    """The reports of every device."""
    return report(fleet, "+")


def all_offers(fleet: str) -> str:
    """The offers of every device, as a shared subscription: each offer goes to one node.

    Only for sessions with expiry 0: brokers hand shared messages to offline members too.
    """
    return f"$share/nodes/{offer(fleet, '+')}"


def all_up(fleet: str, node: str) -> str:
    """The chunks of every transfer that this node granted."""
    return up(fleet, node, "+", "+")


def all_wants(fleet: str) -> str:
    """The wants of every device."""
    return want(fleet, "+")


def all_chunks(fleet: str, digest: str) -> str:
    """Every chunk of one artifact."""
    return _build("artifact", fleet, digest=digest, chunk="+")


# --- reading


def parse(topic: str) -> Topic:
    """Take a topic apart.

    Raises:
        BadMessage: it is none of this layout.
    """
    parts = topic.split("/")
    if parts[:2] == _ROOT.split("/") and len(parts) > 3:
        for kind, layout in _LAYOUT.items():
            fields = _match(layout, parts[3:])
            if fields is not None:
                try:
                    name("fleet", parts[2])
                    for field, value in fields.items():
                        _check(field, value)
                except BrokerError as error:
                    raise BadMessage(f"topic {topic!r}: {error}") from None
                chunk = int(fields.pop("chunk", -1))
                return Topic(kind=kind, fleet=parts[2], chunk=chunk, **fields)
    raise BadMessage(f"topic {topic!r} is none of {_ROOT}/<fleet>/{{{', '.join(_LAYOUT)}}}")


def name(kind: str, value: str) -> str:
    """Return the value if it can be a fleet, device, node or transfer name.

    Raises:
        BrokerError: it is not 1-64 characters of [A-Za-z0-9._-], or is "." or "..".
    """
    if not _NAME.fullmatch(value):
        raise BrokerError(
            f"the {kind} is {value!r}; it needs 1-64 characters out of A-Z a-z 0-9 . _ -, and not . or .. alone"
        )
    return value


def client_id(role: str, fleet: str, name: str) -> str:
    """The MQTT client id of a device or a node: no other role, fleet or name has the same."""
    unique = hashlib.sha256(f"{role}/{fleet}/{name}".encode()).hexdigest()[:12]
    return f"{role}-{unique}-{name}"[:64]


def _build(kind: str, fleet: str, **fields: str) -> str:
    for field, value in fields.items():
        if value != "+":
            _check(field, value)
    parts = [fields[part[1:-1]] if part.startswith("<") else part for part in _LAYOUT[kind]]
    return "/".join([_ROOT, name("fleet", fleet), *parts])


def _match(layout: tuple[str, ...], parts: list[str]) -> dict[str, str] | None:
    if len(layout) != len(parts):
        return None
    fields = {}
    for expected, part in zip(layout, parts, strict=True):
        if expected.startswith("<"):
            fields[expected[1:-1]] = part
        elif expected != part:
            return None
    return fields


def _check(field: str, value: str) -> None:
    if field == "chunk":
        if not (value.isascii() and value.isdigit() and len(value) <= 9):
            raise BrokerError(f"the chunk is {value!r}; it needs to be a number of at most 9 digits")
    elif field == "digest":
        if not _DIGEST.fullmatch(value):
            raise BrokerError(f"the digest is {value!r}; it needs 64 characters out of 0-9 a-f")
    else:
        name(field, value)
