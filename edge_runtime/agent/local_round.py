"""The rounds of one device, without a link: what its trainer is given, and what a round leaves for
the next.

    round-<n>/    the trainer's files of a round (see trainer/job.py)
    finished/     the same for the evaluation after the last round

Error feedback goes on from what the node took. A receipt makes that round's residual the current
one. A final refusal does too, and the refused payload is owed on top, unless the payload itself was
at fault. Files are remembered by the number of their round, so the folder may move.
"""

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from edge_runtime.agent.store import DeviceStore
from edge_runtime.errors import InputError
from edge_runtime.models.facts import Facts
from edge_runtime.protocol.plan import Plan
from edge_runtime.protocol.report import Result
from edge_runtime.settings import Fleet
from edge_runtime.trainer.data import hold_out, stream
from edge_runtime.trainer.job import Carried, Job, Machine

FILES = {
    "private": "state.bin",
    "frame": "frame.bin",
    "residual": "residual.bin",
    "sent": "payload.bin",
    "unsent": "payload.bin",
}
# The node's word on an update; spoilt: its content is at fault.
Verdict = Literal["taken", "refused", "spoilt"]


class DeviceRows(NamedTuple):
    """Files of a device's rows."""

    data: Path
    evaluation: dict[str, Path]  # held-out rows, by name

    def check(self) -> None:
        """Read every file once; raises InputError where a row cannot be used."""
        for path in (self.data, *self.evaluation.values()):
            for _ in stream(path):
                pass

    @property
    def readable(self) -> bool:
        """Whether every row can still be read: a file may have changed since the agent began."""
        try:
            self.check()
        except InputError:
            return False
        return True

    def with_held_out(self, folder: Path) -> "DeviceRows":
        """Where no held-out file is given, keep a tenth of the rows apart in a folder."""
        if self.evaluation:
            return self
        folder.mkdir(parents=True, exist_ok=True)
        train, own = folder / "train.jsonl", folder / "own.jsonl"
        return DeviceRows(train, {"own": own}) if hold_out(self.data, train, own, seed=0) else self


class Start(NamedTuple):
    """Files that a round starts from."""

    chain: Sequence[Path] = ()  # encoded artifacts of the global version; none: version 0
    texts: Path | None = None  # the fleet's public texts


class LocalRounds:
    """One device's folder of rounds, and what it remembers of them."""

    def __init__(
        self, folder: Path, store: DeviceStore, rows: DeviceRows, machine: Machine, export: Path | None = None
    ) -> None:
        """Nothing is read or written yet.

        Args:
            folder: holds a folder for each round.
            store: remembers what the rounds have left; `keep` and `settle` write to it.
            machine: what a trainer may use.
            export: folder for the newest adapter, in PEFT's form.
        """
        self.rows = rows
        self._folder, self._store, self._machine, self._export = folder, store, machine, export

    def folder(self, job: Job) -> Path:
        """Where the job's trainer works."""
        return self._of_round(job.round) if job.train else self._folder / "finished"

    def job(
        self,
        number: int,
        fleet: Fleet,
        facts: Facts,
        plan: Plan,
        start: Start,
        *,
        train: bool = True,
    ) -> Job:
        """What the trainer is given.

        Args:
            number: of the round, counted from 1.
            train: False: the fleet has finished, its last version is evaluated alone.
        """
        left = {name: round_ for name in FILES if (round_ := self._store.get(name))}
        if left.get("sent") != str(number - train):  # the version is of the round before, or the last
            left.pop("sent", None)
        return Job(
            train=train,
            round=number,
            fleet=fleet,
            facts=facts,
            plan=plan,
            depths=depths(fleet, plan),
            data=str(self.rows.data),
            evaluation={name: str(path) for name, path in self.rows.evaluation.items()},
            start=tuple(map(str, start.chain)),
            texts=str(start.texts) if start.texts is not None else None,
            carried=Carried(
                **{name: str(self._of_round(round_) / FILES[name]) for name, round_ in left.items()}
            ),
            machine=self._share(plan),
            export=str(self._export) if self._export else None,
        )

    def _share(self, plan: Plan) -> Machine:
        """The machine without what the plan leaves to a server."""
        budget_bytes = self._machine.budget_bytes
        if budget_bytes is not None:
            budget_bytes -= plan.serving_bytes
        return msgspec.structs.replace(self._machine, budget_bytes=budget_bytes)

    def rank_limit(self, number: int) -> int | None:
        """Highest rank of the device in a round, if the method has pruned it; None: the fleet's."""
        rank = self._store.get("rank")
        return int(rank) if rank is not None and number > 1 else None

    def keep(self, job: Job, result: Result) -> None:
        """Remember a trained round: its private factors, and the rank if the method pruned it."""
        for name in ("private", "frame"):
            if (self.folder(job) / FILES[name]).exists():
                self._store.set(name, str(job.round))
        if job.round == 1:
            self._store.set("rank", None)
        if result.rank is not None and result.rank < job.plan.rank:
            self._store.set("rank", str(result.rank))

    def settle(self, number: int, verdict: Verdict) -> None:
        """Remember what error feedback goes on from, after the node's word on an update."""
        if verdict == "taken":
            self._store.set("sent", str(number))
        if verdict == "spoilt":
            # the update is their sum: any part of it would spoil the next update too
            self._store.set("residual", None)
            self._store.set("unsent", None)
        elif (self._of_round(number) / FILES["residual"]).exists():
            self._store.set("residual", str(number))
            self._store.set("unsent", None if verdict == "taken" else str(number))

    def tidy(self, pending: Iterable[int]) -> None:
        """Delete every round but those pending at the node and those the next round needs."""
        needed = {number for name in FILES if (number := self._store.get(name))} | {*map(str, pending)}
        for folder in self._folder.glob("round-*"):
            if folder not in map(self._of_round, needed):
                shutil.rmtree(folder, ignore_errors=True)

    def _of_round(self, number: int | str) -> Path:
        return self._folder / f"round-{number}"


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
