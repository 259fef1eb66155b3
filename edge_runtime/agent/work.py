"""What rounds leave on a device's disk, and which of it the next round needs.

    work/round-<n>/    of one round's trainer: payload.bin, residual.bin, state.bin (trainer/job.py)

Error feedback goes on from what the node took: a receipt makes that round's residual the current one; a final refusal does
too, and its payload is owed on top, unless it is the payload itself that cannot be used. Which round each comes from is in
the agent's SQLite file.
"""

import shutil
from pathlib import Path
from typing import NamedTuple

from edge_broker.outbox import Outbox
from edge_broker.transfer import Committed, Rejected

from edge_runtime.agent.store import Store
from edge_runtime.errors import InputError
from edge_runtime.protocol.plan import Plan
from edge_runtime.settings import Fleet
from edge_runtime.trainer import data

SPOILT = ("content", "digest", "payload")  # refusals of what an update holds: it would spoil the next one too
FILES = {"private": "state.bin", "residual": "residual.bin", "unsent": "payload.bin"}


class Rows(NamedTuple):
    """A device's rows: what it trains on, and held-out files by name."""

    data: Path
    evaluation: dict[str, Path]


def check_rows(given: Path, evaluation: dict[str, Path], folder: Path) -> Rows:
    """Read every row once; where no held-out file was given, keep a tenth apart in the folder.

    Raises:
        InputError: a file or a row cannot be used.
    """
    rows = data.read_rows(given)
    for path in evaluation.values():
        data.read_rows(path)
    train, held_out = data.split(rows, seed=0)
    if evaluation or not held_out:
        return Rows(given, evaluation)
    folder.mkdir(parents=True, exist_ok=True)
    own = data.write_rows(folder / "own.jsonl", held_out)
    return Rows(data.write_rows(folder / "train.jsonl", train), {"own": own})


def readable(rows: Rows) -> bool:
    """Whether every row can still be read: a file may have changed since `check_rows`."""
    try:
        for path in (rows.data, *rows.evaluation.values()):
            data.read_rows(path)
    except InputError:
        return False
    return True


def depths(fleet: Fleet, plan: Plan) -> tuple[int, ...]:
    """The slices a device trains in turn, the deepest, which takes the most memory, first."""
    if fleet.training.slices == "own":
        return (plan.depth,)
    smaller = {
        model.depth for model in fleet.catalog if model.source == plan.source and model.depth is not None
    }
    return tuple(sorted({plan.depth} | {depth for depth in smaller if depth < plan.depth}, reverse=True))


def folder_of(work: Path, round_: int) -> Path:
    """Where a round's trainer works."""
    return work / f"round-{round_}"


def current(work: Path, store: Store, name: str) -> str | None:
    """The file of this name (see FILES) that the next round starts from, if there is one."""
    round_ = store.get(name)
    return str(folder_of(work, int(round_)) / FILES[name]) if round_ else None


def keep_private(work: Path, store: Store, round_: int) -> None:
    """The factors that stay here go on from this round."""
    if (folder_of(work, round_) / FILES["private"]).exists():
        store.set("private", str(round_))


def settle(work: Path, store: Store, settled: Committed | Rejected) -> None:
    """Error feedback after the node's word; belongs in the transaction that settles the transfer."""
    round_ = settled.manifest.round
    if isinstance(settled, Rejected) and settled.code in SPOILT:
        store.set("residual", None)
        store.set("unsent", None)
    elif (folder_of(work, round_) / FILES["residual"]).exists():
        store.set("residual", str(round_))
        store.set("unsent", None if isinstance(settled, Committed) else str(round_))


def forget_others(folder: Path, digests: set[str]) -> None:
    """Delete what earlier rounds have fetched, but for files of these digests."""
    for path in folder.glob("*"):
        if path.name.partition(".")[0] not in digests:
            path.unlink(missing_ok=True)


def tidy(work: Path, store: Store, outbox: Outbox) -> None:
    """Delete the rounds that neither the next one needs nor the node has still to take."""
    needed = {int(round_) for name in FILES if (round_ := store.get(name))}
    needed |= {manifest.round for manifest in outbox.pending()}
    for folder in work.glob("round-*"):
        if folder not in {folder_of(work, round_) for round_ in needed}:
            shutil.rmtree(folder, ignore_errors=True)
