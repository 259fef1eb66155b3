"""The devices of a run: their models, their rows, and the history that becomes their results."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import msgspec

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
from edge_runtime.simulation.results import Answers, Member
from edge_runtime.simulation.spec import Arm, Device, Spec
from edge_runtime.trainer import data
from edge_runtime.trainer.job import Machine

ROWS_AT_ONCE = 8  # a micro-batch; its rows are alike in length, so little is padded


@dataclass
class Participant:
    """A device of a run, and its history."""

    device: Device
    facts: Facts
    fleet: Fleet  # as this device trains in it: a pooled device makes the steps of all its devices
    plan: Plan  # its rank falls with methods that prune ranks
    rounds: LocalRounds
    rows: int  # that it trains on
    start: tuple[str, ...] = ()  # artifacts that it has fetched and still needs
    answers: list[dict[str, Answers]] = field(default_factory=list)
    bytes_up: list[int] = field(default_factory=list)
    bytes_down: list[int] = field(default_factory=list)


def participants(
    spec: Spec, arm: Arm, fleet: Fleet, files: Path, models: Path, folder: Path
) -> list[Participant]:
    """The devices of the file, each with its rows in a folder of its own.

    In a pooled arm: the first device of each model, depth and task, with all rows of the task.
    """
    shares = draw.shares(spec, files, fleet.seed)
    training = msgspec.structs.replace(fleet.training, slices="own") if arm.pooled else fleet.training
    members = []
    for device, holders in _pools(spec.device, pooled=arm.pooled):
        facts = _facts(device.source, device.first, models)
        depth = device.depth or facts.layers
        steps = training.steps * len(holders)
        rows = [row for holder in holders for row in shares[holder]]
        held_out = draw.test_rows(spec.data[device.data], files)
        home = folder / device.id
        device_rows = _write(home, rows, held_out, data.labels_of(shares[device.id]))
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


def _write(folder: Path, rows: list[data.Row], held_out: list[data.Row], labels: set[str]) -> DeviceRows:
    """Write a device's rows. A held-out row is seen if its label is among `labels`, else unseen."""
    folder.mkdir()
    evaluation = {}
    for name, seen in (("seen", True), ("unseen", False)):
        if part := [row for row in held_out if (row["label"] in labels) is seen]:
            evaluation[name] = data.write_rows(folder / f"{name}.jsonl", part)
    return DeviceRows(data.write_rows(folder / "train.jsonl", rows), evaluation)


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
        bytes_up=participant.bytes_up,
        bytes_down=participant.bytes_down,
    )
