"""A node's message to its devices about a round: signed, and retained for late readers."""

from typing import Literal

import msgspec
from edge_broker.messages import Artifact

from edge_runtime.settings import Fleet

ROUND_DOMAIN = "edge/1/round"
CODEC = "edc2"  # of deltas and global versions: codec.py
FLEET = "*"  # in place of a model class: the version of what all share, for a class without one


class Round(msgspec.Struct, frozen=True):
    """The state of a fleet."""

    node: str
    state: Literal["open", "finished"]  # finished: the last versions are evaluated
    round: int  # counted from 1
    fleet: Fleet
    # By model class, the chain of artifacts whose sum is the version that the round starts from
    # (adapters/versions.py); a class without one starts at version 0.
    versions: dict[str, tuple[Artifact, ...]]
    texts: Artifact | None = None  # the fleet's public texts
