"""What an agent is started with, and the events it tells whoever watches it."""

from pathlib import Path
from typing import NamedTuple

import msgspec
from edge_broker.address import Address

from edge_runtime.planning.predict import Serving
from edge_runtime.serving.endpoint import Endpoint


class ServeOptions(NamedTuple):
    """A server of the newest version beside the agent."""

    endpoint: Endpoint  # on the loopback
    size: Serving


class DeviceOptions(NamedTuple):
    """The command line of `edge-runtime agent`."""

    broker: Address
    fleet: str
    id: str
    data: Path  # the rows to train on
    state: Path  # folder for keys, adapters and work
    budget_bytes: int  # peak that a trainer may reach, together with a server
    evaluation: dict[str, Path]  # held-out files, by name; empty: a tenth of the rows
    models: Path  # where relative paths of the catalog are looked for
    threads: int  # CPU threads of a trainer; 0: all
    device: str  # cpu or cuda
    gpu_cap_bytes: int | None  # bytes a trainer may allocate on the GPU; None: no limit
    wait_s: float  # for the fleet's first round, and for the node's word after the last
    until_finished: bool  # end with the fleet
    serve: ServeOptions | None = None  # None: no server
    on_version: tuple[str, ...] | None = None  # the words of a command to run after each version


class DeviceEvent(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line of the agent's `--json`."""

    device: str
    round: int
    phase: str
    step: int = 0
    steps: int = 0
    loss: float | None = None
    memory_bytes: int = 0  # of the trainer now
    budget_bytes: int = 0
    text: str = ""  # for this device's screen alone
