"""What the agent hands to a trainer process and what it gets back: files in one folder, and progress lines on stdout.

job.json       Job, read by `python -m edge_runtime.trainer FOLDER`
result.json    Result, written last: where it is, everything else is there too
payload.bin    the encoded delta, where the method exchanges something
start.bin      while it trains: the exchanged factors it started from (float32 safetensors)
residual.bin   what rounding lost (float32 safetensors), for the next round
state.bin      the factors that stay private (float32 safetensors)
"""

import msgspec

from edge_runtime import settings
from edge_runtime.models.facts import Facts
from edge_runtime.protocol.plan import Plan


class Job(msgspec.Struct, frozen=True):
    """train: one round of training after the evaluation, else the evaluation alone.

    depths: the slices it trains, a step each in turn; a method that exchanges no layers trains the plan's alone. fleet_rank:
    of the whole adapter, of which a device may have the leading part.
    evaluation: held-out files by name. start: the global version (encoded), None for version 0. private: state.bin of an
    earlier round. anchors: the fleet's public texts.
    residual: residual.bin of the last settled round. unsent: a payload that the node refused, to be sent
    again. export: folder for the adapter in PEFT's form, after an evaluation alone. threads: CPU threads, 0 for all.
    budget_bytes: what the process may take while it trains; None: all there is.
    gpu_cap_bytes: of the GPU, for torch's allocator; None for all there is.
    """

    train: bool
    facts: Facts
    plan: Plan
    adapter: settings.Adapter
    training: settings.Training
    method: settings.Method
    seed: int
    round: int
    rounds: int
    data: str
    evaluation: dict[str, str]
    depths: tuple[int, ...]
    fleet_rank: int
    head: settings.Head | None = None
    codistill: settings.Codistill | None = None
    anchors: str | None = None
    start: str | None = None
    private: str | None = None
    residual: str | None = None
    unsent: str | None = None
    export: str | None = None
    threads: int = 0
    device: str = "cpu"
    budget_bytes: int | None = None
    gpu_cap_bytes: int | None = None


class Progress(msgspec.Struct, frozen=True):
    """One line on the trainer's stdout."""

    phase: str
    step: int = 0
    steps: int = 0
    loss: float | None = None
    memory_bytes: int = 0
