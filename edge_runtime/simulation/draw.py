"""Draws the rows of a study: each device's training rows, the held-out rows, and the public texts.

All draws are seeded, so equal files and seeds give equal rows.
"""

import hashlib
import random
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from edge_runtime.errors import InputError
from edge_runtime.simulation.spec import Data, Device, Spec
from edge_runtime.trainer.data import Row, read_rows


def shares(spec: Spec, folder: Path, seed: int) -> dict[str, list[Row]]:
    """The training rows of each device, by its id; no row is on two devices.

    folder: of the data files.
    """
    held: dict[str, list[Row]] = {device.id: [] for device in spec.device}
    for name, task in spec.data.items():
        # tasks may have a file in common
        drawn = {row["text"] for rows in held.values() for row in rows}
        every = _labelled(folder / task.train, task.label)
        by_label = _by_label([row for row in every if row["text"] not in drawn])
        for label, rows in sorted(by_label.items()):
            mixed = random.Random(f"{seed}/{name}/{label}").sample(rows, len(rows))
            domain = mixed[0].get("domain")
            holders = [
                device.id
                for device in spec.device
                if device.data == name and (not device.domains or domain in device.domains)
            ]
            count = task.per_label or -(-task.rows // len(by_label))
            count = min(count, len(mixed) // max(len(holders), 1))
            for number, holder in enumerate(holders):
                held[holder] += mixed[number * count : (number + 1) * count]
    for device, rows in held.items():
        if not rows:
            raise InputError(f"the device {device} has no rows: its domains are not in its data")
    return held


def public_texts(spec: Spec, folder: Path, *, labelled: bool = False) -> list[Row]:
    """The public texts, without their labels unless a control needs them."""
    if spec.public is None:
        return []
    file, count = spec.public.file, spec.public.texts
    rows = _labelled(folder / file) if labelled else read_rows(folder / file)
    by_label = _by_label(_held_by(spec.device, rows))
    drawn = _evenly(by_label, -(-count // len(by_label)))
    if len(drawn) < count:
        raise InputError(
            f"[public] texts is {count}, but {file} gives {len(drawn)} rows spread evenly over its labels"
        )
    fields = ("text", "label") if labelled else ("text",)
    return [{name: row[name] for name in fields} for row in random.Random(0).sample(drawn, count)]


def test_rows(spec: Spec, name: str, folder: Path) -> list[Row]:
    """A task's held-out rows, in the file's order, the same for every arm and seed."""
    task, devices = spec.data[name], [device for device in spec.device if device.data == name]
    return _held_by(devices, _labelled(folder / task.test, task.label))


def sample(task: Data, count: int) -> list[int]:
    """The numbers of the held-out rows, of so many, that are asked before each round."""
    return sorted(random.Random(0).sample(range(count), min(task.test_rows, count)))


def contents(spec: Spec, folder: Path) -> dict[str, str]:
    """Digests of the study's data files, by their names."""
    try:
        return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in spec.files}
    except OSError as error:
        raise InputError(
            f"cannot read the data file {error.filename}: {error.strerror}; --data is the folder it is looked for in"
        ) from error


def _held_by(devices: Iterable[Device], rows: list[Row]) -> list[Row]:
    """The rows of domains that some of the devices hold: nobody can learn the others."""
    domains = [device.domains for device in devices]
    if not all(domains):
        return rows
    return [row for row in rows if row.get("domain") in set().union(*domains)]


def _by_label(rows: list[Row]) -> dict[str, list[Row]]:
    by_label: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_label[row.get("label", "")].append(row)
    return by_label


def _evenly(by_label: dict[str, list[Row]], count: int) -> list[Row]:
    """`count` rows of each label, or all where the label has fewer."""
    return [
        row
        for label, rows in sorted(by_label.items())
        for row in random.Random(label).sample(rows, min(count, len(rows)))
    ]


def _labelled(path: Path, field: str = "label") -> list[Row]:
    """The rows of a file with a field of theirs as the label."""
    rows = read_rows(path)
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get(field), str):
            raise InputError(
                f"row {number} of {path} has no text under `{field}`, which the study takes as label"
            )
    return [{**row, "label": row[field]} for row in rows]
