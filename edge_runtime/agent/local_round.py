"""The rounds of one device, without a link: what its trainer is given, and what a round leaves for
the next.

    round-<n>/    the trainer's files of a round (see trainer/job.py)
    finished/     the same for the evaluation after the last round

Error feedback goes on from what the node took. A receipt makes that round's residual the current
one. A final refusal does too, and the refused payload is owed on top, unless the payload itself was
at fault. Files are remembered by the number of their round, so the folder may move.
"""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import msgspec

from edge_runtime.models.facts import Facts
from edge_runtime.protocol.plan import Plan
from edge_runtime.protocol.report import Result
from edge_runtime.settings import Fleet
from edge_runtime.trainer.job import Carried, Job, Machine

FILES = {"private": "state.bin", "residual": "residual.bin", "unsent": "payload.bin"}
# The node's word on an update; spoilt: its content is at fault.
Verdict = Literal["taken", "refused", "spoilt"]


class Memory(Protocol):
    """Values that outlive a process: the rounds of private, residual and unsent; the rank."""

    def get(self, name: str) -> str | None:
        """The value; None: there is none."""

    def set(self, name: str, value: str | None) -> None:
        """Keep the value; None forgets it."""


class DeviceRows(NamedTuple):
    """Files of a device's rows."""

    data: Path
    evaluation: dict[str, Path]  # held-out rows, by name


class Task(NamedTuple):
    """A round as one device is to do it."""

    number: int  # counted from 1
    train: bool  # False: the fleet has finished, its last version is evaluated alone
    fleet: Fleet
    facts: Facts
    plan: Plan
    start: Path | None  # encoded global version; None: version 0
    anchors: Path | None  # the fleet's public texts, if it has any


class LocalRounds:
    """One device's folder of rounds, and what it remembers of them."""

    def __init__(
        self, folder: Path, memory: Memory, rows: DeviceRows, machine: Machine, export: Path | None = None
    ) -> None:
        """Nothing is read or written yet.

        Args:
            folder: holds a folder for each round.
            memory: what the rounds have left; `keep` and `settle` write to it.
            machine: what a trainer may use.
            export: folder for the adapter in PEFT's form, once the fleet has finished.
        """
        self.rows = rows
        self._folder, self._memory, self._machine, self._export = folder, memory, machine, export

    def folder(self, task: Task) -> Path:
        """Where the task's trainer works."""
        return self._of_round(task.number) if task.train else self._folder / "finished"

    def job(self, task: Task) -> Job:
        """What the trainer is given."""
        return Job(
            train=task.train,
            round=task.number,
            fleet=task.fleet,
            facts=task.facts,
            plan=task.plan,
            depths=depths(task.fleet, task.plan),
            data=str(self.rows.data),
            evaluation={name: str(path) for name, path in self.rows.evaluation.items()},
            start=str(task.start) if task.start else None,
            anchors=str(task.anchors) if task.anchors else None,
            carried=Carried(**{name: self._carried(name) for name in FILES}),
            machine=self._machine,
            export=str(self._export) if self._export and not task.train else None,
        )

    def rank_limit(self, number: int) -> int | None:
        """Highest rank of the device in a round, if the method has pruned it; None: the fleet's."""
        rank = self._memory.get("rank")
        return int(rank) if rank is not None and number > 1 else None

    def keep(self, task: Task, result: Result) -> None:
        """Remember a trained round: its private factors, and the rank if the method pruned it."""
        if (self.folder(task) / FILES["private"]).exists():
            self._memory.set("private", str(task.number))
        if task.number == 1:
            self._memory.set("rank", None)
        if result.rank is not None and result.rank < task.plan.rank:
            self._memory.set("rank", str(result.rank))

    def settle(self, number: int, verdict: Verdict) -> None:
        """Remember what error feedback goes on from, after the node's word on an update."""
        if verdict == "spoilt":
            # the update is their sum: any part of it would spoil the next update too
            self._memory.set("residual", None)
            self._memory.set("unsent", None)
        elif (self._of_round(number) / FILES["residual"]).exists():
            self._memory.set("residual", str(number))
            self._memory.set("unsent", None if verdict == "taken" else str(number))

    def tidy(self, pending: Iterable[int]) -> None:
        """Delete every round but those pending at the node and those the next round needs."""
        needed = {int(number) for name in FILES if (number := self._memory.get(name))} | {*pending}
        for folder in self._folder.glob("round-*"):
            if folder not in map(self._of_round, needed):
                shutil.rmtree(folder, ignore_errors=True)

    def _of_round(self, number: int) -> Path:
        return self._folder / f"round-{number}"

    def _carried(self, name: str) -> str | None:
        number = self._memory.get(name)
        return str(self._of_round(int(number)) / FILES[name]) if number else None


def depths(fleet: Fleet, plan: Plan) -> tuple[int, ...]:
    """The slices a device trains in turn; the deepest, which takes the most memory, comes first."""
    if fleet.training.slices == "own":
        return (plan.depth,)
    catalog = {
        model.depth for model in fleet.catalog if model.source == plan.source and model.depth is not None
    }
    return tuple(sorted({plan.depth} | {depth for depth in catalog if depth < plan.depth}, reverse=True))


def write_job(folder: Path, job: Job) -> None:
    """Put the job into a folder, where a trainer reads it; a result of an earlier attempt goes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").unlink(missing_ok=True)
    (folder / "job.json").write_bytes(msgspec.json.encode(job))


def read_result(folder: Path) -> Result | None:
    """What the trainer measured; None: it has not come to its end."""
    path = folder / "result.json"
    return msgspec.json.decode(path.read_bytes(), type=Result) if path.exists() else None


def payload_of(folder: Path, result: Result) -> Path | None:
    """The encoded delta; None: the method exchanges nothing."""
    return folder / "payload.bin" if result.payload_bytes else None
