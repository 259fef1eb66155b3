"""What a node tells its devices about a round: signed, and retained so that whoever comes late reads the last."""

from typing import Literal

import msgspec
from edge_broker.messages import Artifact

from edge_runtime.settings import Fleet

ROUND_DOMAIN = "edge/1/round"
CODEC = "int8-block64-zstd"  # of deltas and global versions: codec.py
FLEET = "*"  # in a model class's place: what all classes share, for devices of a class that has no version of its own yet
NOOP = "noop"  # codec and model class of the benchmark's rounds without training


class Round(msgspec.Struct, frozen=True):
    """versions: the global version a round starts from, by model class; a class that is not there starts at version 0.

    anchors: the public texts of a fleet that distils. A finished fleet has no open round; its versions are the last ones.
    """

    node: str
    state: Literal["open", "finished"]
    round: int
    fleet: Fleet
    versions: dict[str, Artifact]
    anchors: Artifact | None = None
