"""Where an agent stands: one type for each stage, with what that stage needs.

Waiting ─> Planning ─> Fetching ─> Working ─> Resting ─> (next round) Planning ...
              │            └─> Starved ─> Planning, when the node is heard of again
              └─> Owing ─> Planning, when the node has answered an earlier update
the last version evaluated ─> Finished
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from edge_broker.messages import Artifact

from edge_runtime.agent.local_round import Task
from edge_runtime.agent.planner import Planned
from edge_runtime.agent.trainer import Running
from edge_runtime.protocol.round import Round


@dataclass
class RoundInProgress:
    """The round that was announced last."""

    announced: Round
    node_key: str  # of the node that announced it
    attempt: int = 0  # trainers started
    introduced: bool = False  # the node did not know this device's key and was told again

    @property
    def finished(self) -> bool:
        """Whether the fleet has finished: the last version is evaluated, not trained."""
        return self.announced.state == "finished"

    def is_same(self, announced: Round, node_key: str) -> bool:
        """Whether an announcement says nothing new."""
        before = (self.node_key, self.announced.state, self.announced.round)
        return before == (node_key, announced.state, announced.round)


class Waiting(NamedTuple):
    """No round was announced yet."""

    until: float  # of time.monotonic
    ignored: str = ""  # why an announced round does not count


class Planning(NamedTuple):
    """The planner has still to answer."""

    round: RoundInProgress


class Owing(NamedTuple):
    """The node has still to answer an earlier update, on which this round builds."""

    round: RoundInProgress
    until: float  # of time.monotonic; infinite unless the agent ends with the fleet


class Fetching(NamedTuple):
    """What the round starts from is on its way."""

    round: RoundInProgress
    planned: Planned
    artifacts: dict[str, Artifact]  # by name: start and anchors
    files: dict[str, Path]  # those that are here
    interrupted: bool = False  # by an outage


class Starved(NamedTuple):
    """What the round starts from could not be had; tried again when the node is heard of."""

    round: RoundInProgress


class Working(NamedTuple):
    """A trainer process runs."""

    round: RoundInProgress
    task: Task
    trainer: Running


class Resting(NamedTuple):
    """Nothing to do until the next round: this one is trained, or failed."""


class Finished(NamedTuple):
    """Nothing to do any more."""


Stage = Waiting | Planning | Owing | Fetching | Starved | Working | Resting | Finished


def deadline(stage: Stage) -> float:
    """Until when (of time.monotonic) the node has to be heard of."""
    return stage.until if isinstance(stage, Waiting | Owing) else math.inf
