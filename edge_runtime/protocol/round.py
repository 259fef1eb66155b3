"""What a node tells its devices about a round: signed, and retained so that a late reader gets the last one."""

from typing import Literal

import msgspec
from edge_broker.messages import Artifact

from edge_runtime.settings import Fleet

ROUND_DOMAIN = "edge/1/round"
CODEC = "int8-block64-zstd"  # of deltas and global versions: codec.py
FLEET = "*"  # stands for a model class: what all classes share, for devices whose class has no version yet
NOOP = "noop"  # codec and model class of rounds without training, by which benchmarks measure the link


class Round(msgspec.Struct, frozen=True):
    """The state of a fleet."""

    node: str
    state: Literal["open", "finished"]  # finished: the last versions are evaluated, no round is open
    round: int  # counted from 1
    fleet: Fleet
    versions: dict[
        str, Artifact
    ]  # what the round starts from, by model class; a class without one starts at version 0
    anchors: Artifact | None = None  # the public texts of a fleet that distils
