"""The devices of a run: their models, their rows, and the history that becomes their results."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from edge_runtime.adapters.shapes import adapter_shapes
from edge_runtime.agent.local_round import DeviceRows, LocalRounds
from edge_runtime.agent.store import DeviceStore
from edge_runtime.methods.interface import Method
from edge_runtime.models.facts import Facts
from edge_runtime.models.slices import kept_layers
from edge_runtime.planning import processes
from edge_runtime.protocol.plan import Plan
from edge_runtime.settings import Fleet
from edge_runtime.simulation import draw
from edge_runtime.simulation.cut import cut
from edge_runtime.simulation.results import Answers, Flags, Kind, Member, packed
from edge_runtime.simulation.spec import Arm, Device, Spec
from edge_runtime.trainer import data
from edge_runtime.trainer.job import Machine

# A micro-batch: memory is not studied here, and of 8 rows an evaluation takes 1.6 times as long.
ROWS_AT_ONCE = 32


class HeldOut(NamedTuple):
    """A task's held-out rows."""

    labels: list[str]  # of all rows, in their order
    sample: list[int]  # numbers of the rows that are asked before each round
    sample_file: Path
    file: Path  # of all rows


@dataclass
class Participant:
    """A device of a run, and its history."""

    device: Device
    facts: Facts
    fleet: Fleet  # as this device trains in it: a pooled device makes the steps of all its devices
    plan: Plan  # its rank falls with methods that prune ranks
    rounds: LocalRounds
    rows: int  # that it trains on
    held_out: HeldOut
    seen: Flags  # held-out rows whose label the device holds
    start: tuple[str, ...] = ()  # artifacts that it has fetched and still needs
    answers: list[dict[Kind, Answers]] = field(default_factory=list)
    # On all held-out rows, after the last round.
    hits: Flags = field(default_factory=lambda: np.zeros(0, bool))
    bytes_up: list[int] = field(default_factory=list)
    bytes_down: list[int] = field(default_factory=list)


def participants(
    spec: Spec, arm: Arm, fleet: Fleet, files: Path, models: Path, folder: Path
) -> list[Participant]:
    """The devices of the file, each with its rows in a folder of its own.

    In a pooled arm: the first device of each model, depth and task, with all rows of the task.
    """
    shares = draw.shares(spec, files, fleet.seed)
    held_out = {name: _held_out(spec, name, files, folder) for name in spec.data}
    training = msgspec.structs.replace(fleet.training, slices="own") if arm.pooled else fleet.training
    members = []
    for device, holders in _pools(spec.device, pooled=arm.pooled):
        facts = _facts(device.source, device.first, models)
        depth = device.depth or facts.layers
        steps = training.steps * len(holders)
        rows = [row for holder in holders for row in shares[holder]]
        task, labels = held_out[device.data], data.labels_of(shares[device.id])
        home = folder / device.id
        home.mkdir()
        device_rows = DeviceRows(data.write_rows(home / "train.jsonl", rows), {})
        rank = None if arm.pooled or "rank" in arm.adapter else device.rank
        members.append(
            Participant(
                device=device,
                facts=facts,
                fleet=msgspec.structs.replace(fleet, training=msgspec.structs.replace(training, steps=steps)),
                plan=Plan(
                    source=device.model,
                    model_class=facts.model_class,
                    depth=depth,
                    layers=facts.layers,
                    weights=spec.study.weights,
                    rows=ROWS_AT_ONCE,
                    tokens=training.max_tokens,
                    rank=rank or fleet.adapter.rank,
                    kept_blocks=depth,  # all: memory is not studied here
                    terms={},
                    step_seconds=0.0,
                ),
                rounds=LocalRounds(home, DeviceStore(Path(":memory:")), device_rows, Machine(threads=1)),
                rows=len(rows),
                held_out=task,
                seen=np.array([label in labels for label in task.labels]),
            )
        )
    return members


def _pools(devices: Sequence[Device], *, pooled: bool) -> list[tuple[Device, list[str]]]:
    """Each device that trains, with the ids of the devices whose rows it has."""
    if not pooled:
        return [(device, [device.id]) for device in devices]
    first = {(device.model, device.depth, device.data): device for device in reversed(devices)}
    return [(device, [each.id for each in devices if each.data == device.data]) for device in first.values()]


@cache
def _facts(source: str, first: int | None, models: Path) -> Facts:
    return processes.prepared(source if first is None else cut(source, first, models), models)


def _held_out(spec: Spec, name: str, files: Path, folder: Path) -> HeldOut:
    rows = draw.test_rows(spec, name, files)
    sample = draw.sample(spec.data[name], len(rows))
    return HeldOut(
        labels=[row["label"] for row in rows],
        sample=sample,
        sample_file=data.write_rows(folder / f"sample-of-{name}.jsonl", [rows[number] for number in sample]),
        file=data.write_rows(folder / f"all-of-{name}.jsonl", rows),
    )


def answers(hits: Flags, seen: Flags) -> dict[Kind, Answers]:
    """Rows answered right, and rows, of each kind that there is; both arguments are a flag a row."""
    kinds: tuple[tuple[Kind, Flags], ...] = (("seen", seen), ("unseen", ~seen))
    return {
        kind: Answers(int((hits & asked).sum()), int(asked.sum())) for kind, asked in kinds if asked.any()
    }


def member(participant: Participant, method: Method) -> Member:
    """A device in the results."""
    device, facts, fleet, plan = participant.device, participant.facts, participant.fleet, participant.plan
    layers = kept_layers(plan.depth, facts.layers)
    shapes = adapter_shapes(facts, layers, fleet.adapter.roles, plan.rank, method)
    return Member(
        id=device.id,
        model_class=facts.model_class,
        depth=plan.depth,
        data=device.data,
        rows=participant.rows,
        steps=fleet.training.steps,
        trained_values=sum(math.prod(shape) for key, shape in shapes.items() if method.factor(key).trained),
        answers=participant.answers,
        held_out=len(participant.seen),
        seen=packed(participant.seen),
        hits=packed(participant.hits),
        bytes_up=participant.bytes_up,
        bytes_down=participant.bytes_down,
    )
