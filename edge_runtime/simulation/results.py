"""The results of a study: one compact file, a line of JSON for each run.

OUT/runs.jsonl     one Outcome a line, sorted by arm and seed
"""

import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
from edge_broker.files import put
from numpy.typing import NDArray

from edge_runtime.simulation import spec

NAME = "runs.jsonl"
Kind = Literal["seen", "unseen"]  # of a held-out row: whether the device holds rows of its label
Flags = NDArray[np.bool_]


class Answers(msgspec.Struct, frozen=True, array_like=True):
    """A device's answers to the held-out rows of one kind."""

    right: int
    rows: int


class Member(msgspec.Struct, frozen=True):
    """A device of a run."""

    id: str
    model_class: str
    depth: int  # layers
    data: str  # name of its task
    rows: int  # that it trains on
    steps: int  # of one round
    trained_values: int  # of its adapter, without its head
    answers: list[dict[Kind, Answers]]  # before each round, to the task's sample of held-out rows
    # Of every held-out row of the task, in order (draw.test_rows), as `packed` has them: whether the
    # device holds its label, and whether its answer after the last round is right.
    held_out: int  # rows
    seen: bytes
    hits: bytes
    bytes_up: list[int]  # sent in each round
    bytes_down: list[int]  # fetched in each round


class Outcome(msgspec.Struct, frozen=True):
    """The result of one run."""

    arm: str
    seed: int
    digest: str  # of all that the result depends on (Spec.digest)
    seconds: float  # of a core
    machine: str  # name of the processor
    code: str  # versions that the run was made with
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
        return mean_accuracy(self.members)


Outcomes = dict[tuple[str, int], Outcome]  # by arm and seed


def packed(flags: Flags) -> bytes:
    """A bit a row, compressed: the rows of a file are often in the order of their labels."""
    return zlib.compress(np.packbits(flags).tobytes(), 9)


def unpacked(bits: bytes, rows: int) -> Flags:
    """What `packed` was given."""
    return np.unpackbits(np.frombuffer(zlib.decompress(bits), np.uint8), count=rows).astype(bool)


def of_kind(member: Member, kind: Kind | None) -> Flags:
    """Which of the task's held-out rows are of a kind for a device; None: all are."""
    if kind is None:
        return np.ones(member.held_out, bool)
    return unpacked(member.seen, member.held_out) == (kind == "seen")


def accuracy(member: Member, kind: Kind | None = None) -> float:
    """Share of the held-out rows of a kind that a device answers right after the last round.

    NaN where the device has no rows of the kind.
    """
    asked = of_kind(member, kind)
    return float(unpacked(member.hits, member.held_out)[asked].mean()) if asked.any() else float("nan")


def accuracy_before(member: Member, round_: int, kind: Kind | None = None) -> float:
    """The same before a round, counted from 1, of the task's sample of held-out rows."""
    answers = [answer for name, answer in member.answers[round_ - 1].items() if kind in (None, name)]
    rows = sum(answer.rows for answer in answers)
    return sum(answer.right for answer in answers) / rows if rows else float("nan")


def mean_accuracy(members: Sequence[Member], kind: Kind | None = None, before: int | None = None) -> float:
    """Mean over the devices that have rows of the kind, before a round or after the last."""
    shares = [
        accuracy(member, kind) if before is None else accuracy_before(member, before, kind)
        for member in members
    ]
    return mean([share for share in shares if not math.isnan(share)])


def read(out: Path) -> Outcomes:
    """The runs that a study's folder has of this COMPUTATION; runs of another are left out."""
    path = out / NAME
    lines = path.read_bytes().splitlines() if path.exists() else []
    # what another computation wrote may have other fields
    present = [
        line for line in lines if msgspec.json.decode(line)["digest"].startswith(f"{spec.COMPUTATION}-")
    ]
    outcomes = [msgspec.json.decode(line, type=Outcome) for line in present]
    return {(outcome.arm, outcome.seed): outcome for outcome in outcomes}


def add(out: Path, outcome: Outcome) -> None:
    """Write a run durably; it replaces the run of the same arm and seed, and runs that `read` leaves out."""
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
