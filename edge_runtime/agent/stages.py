"""Where an agent stands, with what that stage needs.

Waiting ─> planning ─> Fetching ─> Working ─> resting ─> (next round) planning ...
              │            └─> starved ─> planning, when the node is heard of again
              └─> Owing ─> planning, when the node has answered an earlier update
the last version evaluated ─> finished
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from edge_broker.messages import Artifact

from edge_runtime.agent.planner import Planned
from edge_runtime.agent.trainer import Running
from edge_runtime.protocol.round import Round
from edge_runtime.settings import Fleet
from edge_runtime.trainer.job import Job

NO_ROUND = Round(node="", state="open", round=0, fleet=Fleet("", ()), versions={})


@dataclass
class RoundInProgress:
    """The round that was announced last; its number is 0 before the first."""

    announced: Round = NO_ROUND
    node_key: str = ""  # of the node that announced it
    attempt: int = 0  # trainers started
    introduced: bool = False  # the node did not know this device's key and was told again

    @property
    def finished(self) -> bool:
        """Whether the fleet has finished: the last version is evaluated, not trained."""
        return self.announced.state == "finished"


class Waiting(NamedTuple):
    """No round was announced yet."""

    until: float  # of time.monotonic
    ignored: str = ""  # why an announced round does not count


class Owing(NamedTuple):
    """The node has still to answer an earlier update, on which this round builds."""

    until: float  # of time.monotonic; infinite unless the agent ends with the fleet


class Fetching(NamedTuple):
    """What the round starts from is on its way."""

    planned: Planned
    start: tuple[Artifact, ...]  # the global version's chain
    texts: Artifact | None  # public ones
    interrupted: bool = False  # by an outage

    @property
    def artifacts(self) -> tuple[Artifact, ...]:
        """All of them, the texts last."""
        return (*self.start, self.texts) if self.texts is not None else self.start


class Working(NamedTuple):
    """A trainer process runs."""

    job: Job
    trainer: Running


Stage = (
    Waiting
    | Owing
    | Fetching
    | Working
    # planning: the planner has still to answer. starved: what the round starts from could not be had.
    # resting: this round is trained, or failed. finished: nothing to do any more.
    | Literal["planning", "starved", "resting", "finished"]
)
