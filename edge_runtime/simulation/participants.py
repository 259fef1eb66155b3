"""The devices of a run: their models, their rows, and the history that becomes their results."""

import math
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from edge_runtime.adapters.shapes import adapter_shapes
from edge_runtime.methods.interface import Method
from edge_runtime.models.facts import Facts
from edge_runtime.models.slices import kept_layers
from edge_runtime.planning import processes
from edge_runtime.settings import Fleet
from edge_runtime.simulation import draw
from edge_runtime.simulation.cut import cut
from edge_runtime.simulation.results import Answers, Member
from edge_runtime.simulation.spec import ANCHORS, Arm, Device, Spec
from edge_runtime.trainer import data


@dataclass
class Participant:
    """A device of a run, and its history."""

    device: Device
    facts: Facts
    rows: list[data.Row]  # training rows
    labels: set[str]  # of its rows in the file; held-out rows of further labels are unseen
    stands_for: int  # devices of the study's file; more than itself in a pooled arm
    rank: int  # of its adapter; a method may lower it
    answers: list[dict[str, Answers]] = field(default_factory=list)
    bytes_up: list[int] = field(default_factory=list)
    bytes_down: list[int] = field(default_factory=list)

    @property
    def depth(self) -> int:
        """Layers of the device's model."""
        return self.device.depth or self.facts.layers


def participants(spec: Spec, arm: Arm, fleet: Fleet, files: Path, models: Path) -> list[Participant]:
    """The devices of the file.

    In a pooled arm: the first device of each model, depth and task, with all rows of the task.
    """

    @cache
    def facts_of(source: str, first: int | None) -> Facts:
        return processes.prepared(source if first is None else cut(source, first, models), models)

    shares = draw.shares(spec, files, fleet.seed)
    if arm.pooled:
        groups = {(device.model, device.depth, device.data): device for device in reversed(spec.device)}
        trains_on = {
            device.id: [member.id for member in spec.device if member.data == device.data]
            for device in groups.values()
        }
    else:
        trains_on = {device.id: [device.id] for device in spec.device}
    one_rank = arm.pooled or "rank" in arm.adapter
    devices = {device.id: device for device in spec.device}
    return [
        Participant(
            device=devices[name],
            facts=facts_of(devices[name].source, devices[name].first),
            rows=[row for member in members for row in shares[member]],
            labels=set(data.labels_of(shares[name])),
            stands_for=len(members),
            rank=fleet.adapter.rank if one_rank else devices[name].rank or fleet.adapter.rank,
        )
        for name, members in trains_on.items()
    ]


def write_files(spec: Spec, fleet: Fleet, participants: list[Participant], files: Path, folder: Path) -> None:
    """Training rows and held-out rows of each device, and the public texts."""
    for participant in participants:
        place = folder / participant.device.id
        place.mkdir(parents=True)
        data.write_rows(place / "train.jsonl", participant.rows)
        held_out = draw.test_rows(spec.data[participant.device.data], files)
        for name, held in (("seen", True), ("unseen", False)):
            part = [row for row in held_out if (row["label"] in participant.labels) is held]
            if part:
                data.write_rows(place / f"{name}.jsonl", part)
    if fleet.codistill is not None:
        data.write_rows(folder / ANCHORS, draw.anchors(spec, files))


def member(participant: Participant, fleet: Fleet, method: Method) -> Member:
    """A device in the results."""
    layers = kept_layers(participant.depth, participant.facts.layers)
    shapes = adapter_shapes(participant.facts, layers, fleet.adapter.roles, participant.rank, method)
    return Member(
        id=participant.device.id,
        model_class=participant.facts.model_class,
        depth=participant.depth,
        data=participant.device.data,
        rows=len(participant.rows),
        steps=fleet.training.steps * participant.stands_for,
        trained_values=sum(math.prod(shape) for key, shape in shapes.items() if method.factor(key).trained),
        answers=participant.answers,
        bytes_up=participant.bytes_up,
        bytes_down=participant.bytes_down,
    )
