"""What an agent is given, and what it tells whoever watches it."""

from pathlib import Path
from typing import NamedTuple

import msgspec
from edge_broker.address import Address


class Options(NamedTuple):
    """evaluation: held-out files by name. gpu_cap_bytes: of the GPU, for each trainer. noop_bytes: send that much noise each
    round instead of training, for benchmarks."""

    broker: Address
    fleet: str
    id: str
    data: Path
    state: Path
    budget_bytes: int
    evaluation: dict[str, Path]
    models: Path
    threads: int
    device: str
    gpu_cap_bytes: int | None
    wait_s: float
    until_finished: bool
    noop_bytes: int


class Event(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line of the agent's log, or of its `--json`."""

    device: str
    round: int
    phase: str
    step: int = 0
    steps: int = 0
    loss: float | None = None
    memory_bytes: int = 0
    budget_bytes: int = 0
    text: str = ""
