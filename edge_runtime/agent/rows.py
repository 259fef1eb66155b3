"""A device's rows, checked before anything is sent and again when a trainer refuses its input."""

from pathlib import Path

from edge_runtime.agent.local_round import DeviceRows
from edge_runtime.errors import InputError
from edge_runtime.trainer import data


def check(path: Path, evaluation: dict[str, Path], folder: Path) -> DeviceRows:
    """Read every row once. Where no held-out file is given, a tenth of the rows is kept apart.

    Args:
        path: the rows to train on.
        evaluation: held-out files, by name.
        folder: takes the two parts, if the rows are split.

    Raises:
        InputError: a file or a row cannot be used.
    """
    rows = data.read_rows(path)
    for held_out_file in evaluation.values():
        data.read_rows(held_out_file)
    train, held_out = data.split(rows, seed=0)
    if evaluation or not held_out:
        return DeviceRows(path, evaluation)
    folder.mkdir(parents=True, exist_ok=True)
    held_out_file = data.write_rows(folder / "own.jsonl", held_out)
    return DeviceRows(data.write_rows(folder / "train.jsonl", train), {"own": held_out_file})


def readable(rows: DeviceRows) -> bool:
    """Whether every row can still be read: a file may have changed since `check`."""
    try:
        for path in (rows.data, *rows.evaluation.values()):
            data.read_rows(path)
    except InputError:
        return False
    return True
