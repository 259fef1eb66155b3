"""Draws the rows of a study: each device's training rows, the held-out rows, and the public texts.

All draws are seeded, so equal files and seeds give equal rows.
"""

import random
from collections import Counter, defaultdict
from pathlib import Path

from edge_runtime.errors import InputError
from edge_runtime.simulation.spec import Data, Spec
from edge_runtime.trainer.data import Row, read_rows


def shares(spec: Spec, folder: Path, seed: int) -> dict[str, list[Row]]:
    """The training rows of each device, by its id; no row is on two devices.

    folder: of the data files.
    """
    held: dict[str, list[Row]] = {device.id: [] for device in spec.device}
    for name, task in spec.data.items():
        by_label = _by_label(_labelled(folder / task.train))
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
    by_label = _by_label(_labelled(folder / file) if labelled else read_rows(folder / file))
    drawn = _evenly(by_label, -(-count // len(by_label)))
    if len(drawn) < count:
        raise InputError(
            f"[public] texts is {count}, but {file} gives {len(drawn)} rows spread evenly over its labels"
        )
    fields = ("text", "label") if labelled else ("text",)
    return [{name: row[name] for name in fields} for row in random.Random(0).sample(drawn, count)]


def test_rows(task: Data, folder: Path) -> list[Row]:
    """A task's held-out rows, the same for every arm and seed."""
    rows = _labelled(folder / task.test)
    if not task.test_per_label:
        return random.Random(0).sample(rows, min(task.test_rows or len(rows), len(rows)))
    drawn = _evenly(_by_label(rows), task.test_per_label)
    label, count = Counter(row["label"] for row in drawn).most_common()[-1]
    if count < task.test_per_label:
        raise InputError(
            f"test_per_label is {task.test_per_label}, but {task.test} has {count} rows of `{label}`"
        )
    return drawn


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


def _labelled(path: Path) -> list[Row]:
    rows = read_rows(path)
    for number, row in enumerate(rows, 1):
        if "label" not in row:
            raise InputError(f"row {number} of {path} has no label, which a study needs")
    return rows
