"""Every topic of the link, built and parsed in one place.

    edge/1/<fleet>/round                           retained, signed
    edge/1/<fleet>/node                            retained: presence of the fleet's node
    edge/1/<fleet>/device/<id>/presence            retained
    edge/1/<fleet>/device/<id>/inbox/<transfer>    to the device: grant, pause, receipt, reject
    edge/1/<fleet>/device/<id>/report
    edge/1/<fleet>/offer/<id>                      signed manifest
    edge/1/<fleet>/node/<node>/up/<id>/<transfer>  chunks of an update
    edge/1/<fleet>/want/<id>                       chunks a device still misses
    edge/1/<fleet>/artifact/<digest>/<n>           chunks of a global adapter

The 1 is the version of this layout. No topic has more than 7 slashes, the limit of AWS IoT Core.
With ANY in place of a name, a topic is a filter to subscribe to.
"""

import hashlib
import re

import msgspec

from edge_broker.errors import BadMessage, BrokerError

ANY = "+"
NAME = r"(?!\.{1,2}\Z)[A-Za-z0-9._-]{1,64}"  # also names a file: neither . nor ..
DIGEST = r"[0-9a-f]{64}"
NAME_FORM = "1-64 characters out of A-Z a-z 0-9 . _ -, and not . or .. alone"  # NAME in words
_RULES = {
    "digest": (DIGEST, "64 characters out of 0-9 a-f"),
    "chunk": ("[0-9]{1,9}", "to be a number of at most 9 digits"),
}
_ROOT = "edge/1"
_LAYOUT = {
    "round": "{fleet}/round",
    "node": "{fleet}/node",
    "presence": "{fleet}/device/{device}/presence",
    "inbox": "{fleet}/device/{device}/inbox/{transfer}",
    "report": "{fleet}/device/{device}/report",
    "offer": "{fleet}/offer/{device}",
    "up": "{fleet}/node/{node}/up/{device}/{transfer}",
    "want": "{fleet}/want/{device}",
    "artifact": "{fleet}/artifact/{digest}/{chunk}",
}
_PATTERNS = {
    kind: re.compile(f"{_ROOT}/" + re.sub(r"{(\w+)}", r"(?P<\1>[^/]*)", layout))
    for kind, layout in _LAYOUT.items()
}


class Topic(msgspec.Struct, frozen=True):
    """A parsed topic; fields that its kind does not have are empty."""

    kind: str  # round, node, presence, inbox, report, offer, up, want or artifact
    fleet: str
    device: str = ""
    node: str = ""
    transfer: str = ""
    digest: str = ""
    chunk: int = -1


def round(fleet: str) -> str:
    """The retained, signed announcement of the fleet's round."""
    return _build("round", fleet=fleet)


def node(fleet: str) -> str:
    """The retained presence of the fleet's node."""
    return _build("node", fleet=fleet)


def presence(fleet: str, device: str) -> str:
    """The retained presence of a device."""
    return _build("presence", fleet=fleet, device=device)


def inbox(fleet: str, device: str, transfer: str) -> str:
    """What the node tells a device about one transfer, or one of its processes by its name."""
    return _build("inbox", fleet=fleet, device=device, transfer=transfer)


def report(fleet: str, device: str) -> str:
    """A device's measurements of a round."""
    return _build("report", fleet=fleet, device=device)


def offer(fleet: str, device: str) -> str:
    """A device's signed manifests."""
    return _build("offer", fleet=fleet, device=device)


def all_offers(fleet: str) -> str:
    """The offers of every device, as a shared subscription: each offer goes to one node.

    Only for sessions with expiry 0: brokers hand shared messages to offline members too.
    """
    return f"$share/nodes/{offer(fleet, ANY)}"


def up(fleet: str, node: str, device: str, transfer: str) -> str:
    """The chunks of one transfer, to the node that granted it."""
    return _build("up", fleet=fleet, node=node, device=device, transfer=transfer)


def want(fleet: str, device: str) -> str:
    """Which chunks of an artifact a device still misses."""
    return _build("want", fleet=fleet, device=device)


def artifact(fleet: str, digest: str, chunk: int | str) -> str:
    """One chunk of an artifact."""
    return _build("artifact", fleet=fleet, digest=digest, chunk=str(chunk))


def parse(topic: str) -> Topic:
    """Take a topic apart; BadMessage if it is none of this layout."""
    for kind, pattern in _PATTERNS.items():
        if match := pattern.fullmatch(topic):
            fields = match.groupdict()
            try:
                for field, value in fields.items():
                    name(field, value)
            except BrokerError as error:
                raise BadMessage(f"topic {topic!r}: {error}") from None
            return Topic(kind=kind, chunk=int(fields.pop("chunk", -1)), **fields)
    raise BadMessage(f"topic {topic!r} is none of {_ROOT}/<fleet>/{{{', '.join(_LAYOUT)}}}")


def name(field: str, value: str) -> str:
    """Return the value if a topic can have it in this field; else raise BrokerError.

    A field without a rule of its own needs a name: a fleet, a device, a node, a transfer.
    """
    pattern, needs = _RULES.get(field, (NAME, NAME_FORM))
    if not re.fullmatch(pattern, value):
        raise BrokerError(f"the {field} is {value!r}; it needs {needs}")
    return value


def client_id(role: str, fleet: str, name: str, process: str = "") -> str:
    """The MQTT client id of a device or a node: no other role, fleet or name has the same.

    process: of a client that must not take over the connection of an earlier one; random.
    """
    unique = hashlib.sha256(f"{role}/{fleet}/{name}/{process}".encode()).hexdigest()[:12]
    return f"{role}-{unique}-{name}"[:64]


def _build(kind: str, **fields: str) -> str:
    for field, value in fields.items():
        if value != ANY:
            name(field, value)
    return f"{_ROOT}/{_LAYOUT[kind].format(**fields)}"
