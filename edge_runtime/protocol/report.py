"""A device's report to its node about a round: signed, and retained for late readers.

A report holds numbers, words from the lists below, and words that the device had from the node (the
catalog's source). A report never holds a text of the device: no sentence of an error, row, path,
address, or name of a held-out file. The sentence behind a failure stays in the device's log.
"""

from typing import Literal

import msgspec

from edge_runtime.protocol.plan import Plan
from edge_runtime.settings import Boundaries

REPORT_DOMAIN = "edge/1/report"

Cause = Literal[
    "data",
    "model",
    "machine",
    "input",
    "budget",
    "memory",
    "time",
    "disk",
    "trainer",
    "link",
    "refused",
    "internal",
]
MEANINGS: dict[Cause, str] = {
    "data": "a row of its data or of its held-out data cannot be used",
    "model": "a model of the catalog cannot be found or read there",
    "machine": "torch is not installed there, or cannot use the device",
    "input": "its trainer refused the model, the version or a file of an earlier round; or its agent an option that it was given",
    "budget": "no plan fits: its memory budget is too small for every model, or every step too slow",
    "memory": "its trainer was short of memory, or was killed",
    "time": "its trainer took longer than the round allows",
    "disk": "its disk stayed full",
    "trainer": "its trainer ended without a result",
    "link": "a file that the round starts from, or its update, did not get through the broker",
    "refused": "the node refused its update",
    "internal": "its agent met a fault of the software",
}


class Score(msgspec.Struct, frozen=True, omit_defaults=True):
    """How well a model does on held-out rows."""

    loss: float | None  # mean over completion tokens; None: not finite
    accuracy: float  # share of rows whose every completion token is the model's first choice
    rows: int
    # A bit for each row in the file's order, as numpy.packbits has them: 1 where the row counts in
    # `accuracy`. Only in a trainer's result: what a device does on a row does not leave the device.
    hits: bytes = b""


class PhaseMemory(msgspec.Struct, frozen=True, omit_defaults=True):
    """Memory of one phase of the trainer; None: the system or the device has no such figure."""

    peak_bytes: int  # counts against the budget (see trainer/meter.py)
    anonymous_bytes: int | None = None  # part of the resident size at the end of the phase
    file_mapped_bytes: int | None = None  # the other part, shared memory included
    # Of the nearest cgroup since its start, page cache and all processes included.
    cgroup_peak_bytes: int | None = None
    resident_peak_bytes: int | None = None  # in RAM, on a machine with a GPU
    allocated_peak_bytes: int | None = None  # of tensors, from torch's CUDA allocator
    reserved_peak_bytes: int | None = None  # held by torch's CUDA allocator
    # Used of the GPU at the end of the phase, CUDA and other processes included.
    driver_bytes: int | None = None


class Easing(msgspec.Struct, frozen=True):
    """A change to cheaper steps, after a step came near the budget; fields are the plan's."""

    rows: int
    boundaries: Boundaries
    mlp_tokens: int | None
    kept_blocks: int


class Result(msgspec.Struct, frozen=True):
    """A trainer's measurements of a round."""

    samples: int  # rows trained on
    evaluation: dict[str, Score]  # of the version the round started from, by held-out file
    losses: list[float]  # of each step with a finite loss
    step_seconds: list[float]
    phases: dict[str, PhaseMemory]
    seconds: dict[str, float]  # by phase
    measured_peak_bytes: int
    payload_bytes: int
    skipped: int = 0  # steps whose loss was not finite
    easings: list[Easing] = []
    empty: int = 0  # rows of the round that have no token to learn, which were passed over
    rank: int | None = None  # rank of the next round, where the method prunes ranks


class Report(msgspec.Struct, frozen=True):
    """How a round went on one device.

    joined: the plan is made. trained: the node has the update, where the method exchanges anything.
    failed: see cause. finished: the last version was evaluated.
    """

    device: str
    node_key: str  # of the receiver: a broker may outlive a node of the same fleet name
    round: int
    state: Literal["joined", "trained", "failed", "finished"]
    budget_bytes: int
    plan: Plan | None = None
    result: Result | None = None
    cause: Cause | None = None  # of a failure
    exit_code: int | None = None  # of the trainer or agent that failed; negative: a signal
    bytes_up: int = 0  # PUBLISH packets since the round began
    bytes_down: int = 0
    process: str = ""  # random name of the agent's process, as in its presence


def failure(report: Report) -> str:
    """Why a device failed, as a clause for people; empty unless the report says so."""
    if report.cause is None:
        return ""
    code = "" if report.exit_code is None else f" (exit code {report.exit_code})"
    return f"{report.cause}: {MEANINGS[report.cause]}{code}; the device's own log has the sentence"


def without_names(result: Result) -> Result:
    """The result without its rows' hits, and with held-out files numbered in order.

    The user's names of files may be private.
    """
    scores = {
        f"held_out_{number}": msgspec.structs.replace(score, hits=b"")
        for number, score in enumerate(result.evaluation.values(), 1)
    }
    return msgspec.structs.replace(result, evaluation=scores)
