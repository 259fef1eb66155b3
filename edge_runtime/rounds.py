"""What node and devices tell each other about a round; both signed, both retained so that whoever comes late reads the last.

Round    node to all      what to train, on which global version
Report   device to node   how a round went here: plan, measured peak, losses, scores, bytes
"""

from typing import Literal

import msgspec
from edge_broker.messages import Artifact

from edge_runtime.planning.plan import Plan
from edge_runtime.settings import Fleet
from edge_runtime.training.job import Result

ROUND_DOMAIN = "edge/1/round"
REPORT_DOMAIN = "edge/1/report"
CODEC = "int8-block64-zstd"  # of deltas and global versions: codec.py
FLEET = (
    "*"  # in a model class's place: what all classes share, for devices of a class that has no version of its own yet
)
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


class Report(msgspec.Struct, frozen=True):
    """How a round went on one device.

    node_key: of the node it is meant for, as broker and device may outlive a node of the same fleet's name.
    state: joined (this is what it will train), trained (and taken by the node, where the method exchanges something),
    failed (reason says why), or finished (the last version was evaluated).
    bytes_up, bytes_down: PUBLISH packets since the round began.
    """

    device: str
    node_key: str
    round: int
    state: Literal["joined", "trained", "failed", "finished"]
    budget_bytes: int
    plan: Plan | None = None
    result: Result | None = None
    reason: str = ""
    bytes_up: int = 0
    bytes_down: int = 0
