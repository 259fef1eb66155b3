"""The results of a study: one compact file, a line of JSON for each run.

OUT/runs.jsonl     one Outcome a line, sorted by arm and seed
"""

from collections.abc import Sequence
from pathlib import Path

import msgspec
from edge_broker.files import put

NAME = "runs.jsonl"


class Answers(msgspec.Struct, frozen=True, array_like=True):
    """A device's answers to the held-out rows of one kind."""

    right: int
    rows: int
    loss: float | None  # mean over the rows; None: answers were completed, not compared


class Member(msgspec.Struct, frozen=True):
    """A device of a run."""

    id: str
    model_class: str
    depth: int  # layers
    data: str  # name of its task
    rows: int  # that it trains on
    steps: int  # of one round
    trained_values: int  # of its adapter, without its head
    # Before each round and after the last, by kind: rows whose label the device holds are "seen",
    # the others "unseen".
    answers: list[dict[str, Answers]]
    bytes_up: list[int]  # sent in each round
    bytes_down: list[int]  # fetched in each round


class Outcome(msgspec.Struct, frozen=True):
    """The result of one run."""

    arm: str
    seed: int
    digest: str  # of all that the result depends on (Spec.digest)
    seconds: float
    machine: str  # name of the processor
    code: str  # versions that the run was made with; "": not recorded
    # Of each round: squared norm of the change of adapters and heads in all versions. Empty where a
    # method's versions have the same product in other factors.
    moved: list[float]
    # Of each round: mean cosine between the classes' steps, and the share below 0 (versions.cosines).
    # Empty where nothing that is trained crosses classes.
    cosines: list[tuple[float, float]]
    members: list[Member]

    @property
    def accuracy(self) -> float:
        """Mean over the devices after the last round."""
        return sum(accuracy(member, -1) for member in self.members) / len(self.members)


Outcomes = dict[tuple[str, int], Outcome]  # by arm and seed


def accuracy(member: Member, round_: int, kind: str | None = None) -> float:
    """Share of held-out rows that a device answers right before a round; -1: after the last.

    kind: "seen" or "unseen"; None: all rows. NaN where the device has no rows of the kind.
    """
    answers = [answer for name, answer in member.answers[round_].items() if kind in (None, name)]
    rows = sum(answer.rows for answer in answers)
    return sum(answer.right for answer in answers) / rows if rows else float("nan")


def read(out: Path) -> Outcomes:
    """All runs that a study's folder has."""
    path = out / NAME
    lines = path.read_bytes().splitlines() if path.exists() else []
    outcomes = [msgspec.json.decode(line, type=Outcome) for line in lines]
    return {(outcome.arm, outcome.seed): outcome for outcome in outcomes}


def add(out: Path, outcome: Outcome) -> None:
    """Write a run durably; it replaces the run of the same arm and seed."""
    outcomes = read(out) | {(outcome.arm, outcome.seed): outcome}
    fresh = out / f"{NAME}.part"
    fresh.write_bytes(b"".join(msgspec.json.encode(outcomes[key]) + b"\n" for key in sorted(outcomes)))
    put(fresh, out / NAME)


def short(number: float) -> float:
    """The number to six digits, as the file has it."""
    return float(f"{number:.6g}")


def mean(values: Sequence[float]) -> float:
    """The mean; NaN of no values."""
    return sum(values) / len(values) if values else float("nan")
