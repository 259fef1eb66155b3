"""The job that an agent hands to a trainer process, and the progress that comes back.

Both processes share one folder; progress lines travel on stdout.

job.json       Job, read by `python -m edge_runtime.trainer FOLDER`
result.json    Result; written last, so when it exists the other files are complete
payload.bin    the encoded delta, if the method exchanges anything
start.bin      during training: the exchanged factors as the round began (float32 safetensors)
residual.bin   what rounding lost from the payload (float32 safetensors), for the next round
state.bin      the factors that stay private (float32 safetensors)
"""

import msgspec

from edge_runtime.models.facts import Facts
from edge_runtime.protocol.plan import Plan
from edge_runtime.settings import Fleet


class Carried(msgspec.Struct, frozen=True):
    """Paths of files that earlier rounds left on this device; None: there is none."""

    private: str | None = None  # state.bin of an earlier round
    frame: str | None = None  # frame.bin of an earlier round: maps into the common frame
    residual: str | None = None  # residual.bin of the last settled round
    sent: str | None = None  # payload.bin that is part of the version that the job starts from
    unsent: str | None = None  # payload.bin that the node refused; its delta is sent again


class Machine(msgspec.Struct, frozen=True):
    """The share of this machine that the trainer process may use."""

    threads: int = 0  # CPU threads; 0: all
    device: str = "cpu"
    budget_bytes: int | None = None  # peak the process may reach while it trains; None: no limit
    gpu_cap_bytes: int | None = None  # bytes torch may allocate on the GPU; None: no limit


class Job(msgspec.Struct, frozen=True):
    """Work for one trainer process: an evaluation, and then a round of training if train is True."""

    train: bool
    round: int  # counted from 1
    fleet: Fleet
    facts: Facts
    plan: Plan
    # Depth slices that training steps take in turn; a method without shared layers trains plan.depth.
    depths: tuple[int, ...]
    data: str  # path of the training rows
    evaluation: dict[str, str]  # paths of held-out rows, by name
    start: tuple[str, ...] = ()  # paths of the artifacts whose sum the round starts from; none: version 0
    texts: str | None = None  # path of the fleet's public texts
    carried: Carried = Carried()
    machine: Machine = Machine()
    export: str | None = None  # folder for the adapter as the job starts with it (adapters/learned.py)


class Progress(msgspec.Struct, frozen=True):
    """One line on the trainer's stdout."""

    phase: str
    step: int = 0
    steps: int = 0
    loss: float | None = None
    memory_bytes: int = 0
    text: str = ""  # for this device's screen alone
