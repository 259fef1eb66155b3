"""What a device tells its node about a round: signed, and retained so that whoever comes late reads the last."""

from typing import Literal

import msgspec

from edge_runtime.protocol.plan import Plan

REPORT_DOMAIN = "edge/1/report"


class Score(msgspec.Struct, frozen=True):
    """loss: mean over completion tokens, None where it is not finite. accuracy: share of rows whose every completion token is
    the most likely one, that is, rows that greedy decoding would complete exactly."""

    loss: float | None
    accuracy: float
    rows: int


class PhaseMemory(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one phase took, in bytes; None where the system or the device has no such figure.

    peak_bytes: what counts against the budget (see trainer/meter.py).
    anonymous_bytes, file_mapped_bytes: what the resident size was made of when the phase ended; shared memory is the latter's.
    cgroup_peak_bytes: of the nearest cgroup since it was made, with page cache and all its processes.
    resident_peak_bytes: in RAM, beside a GPU; without one it is the peak.
    allocated_peak_bytes, reserved_peak_bytes: of torch's CUDA allocator, what tensors took and what it held for them.
    driver_bytes: taken of the GPU when the phase ended, with CUDA's own and every other process's.
    """

    peak_bytes: int
    anonymous_bytes: int | None = None
    file_mapped_bytes: int | None = None
    cgroup_peak_bytes: int | None = None
    resident_peak_bytes: int | None = None
    allocated_peak_bytes: int | None = None
    reserved_peak_bytes: int | None = None
    driver_bytes: int | None = None


class Result(msgspec.Struct, frozen=True):
    """evaluation: of the version the round started from. losses: of each step but the skipped ones, whose loss was not
    finite. step_seconds: of each step. eased: how the steps went on when memory got short. rank: in which the device goes on,
    where its method prunes ranks."""

    samples: int
    evaluation: dict[str, Score]
    losses: list[float]
    step_seconds: list[float]
    phases: dict[str, PhaseMemory]
    seconds: dict[str, float]
    measured_peak_bytes: int
    payload_bytes: int
    skipped: int = 0
    eased: list[str] = []
    rank: int | None = None


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
