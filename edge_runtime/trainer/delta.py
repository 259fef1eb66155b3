"""Stage "write": what a trained round leaves behind.

    private factors      state.bin
    exchanged factors    delta = trained - start + owed
                         payload.bin = encode(delta)        residual.bin = delta - decode(payload)

Owed are the residual of the last settled round and a payload that the node refused. The trained
factors become delta and then residual in place: only one copy of the adapter's size exists.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import safe_open

from edge_runtime.adapters import attach
from edge_runtime.methods.interface import Method
from edge_runtime.protocol import codec
from edge_runtime.protocol.keys import label_of, leading, parse
from edge_runtime.trainer import disk
from edge_runtime.trainer.job import Carried
from edge_runtime.trainer.public import DeviceAnswers
from edge_runtime.trainer.start import FILE, overlay


class Sent(NamedTuple):
    """The payload of a round."""

    payload_bytes: int  # 0: the method exchanges nothing
    rank: int | None  # in which the device goes on; None: the method does not prune


def write(
    folder: Path,
    adapter: attach.Attached,
    method: Method,
    taught: set[str],
    answers: DeviceAnswers,
    carried: Carried,
    tell: disk.Tell,
) -> Sent:
    """Write state.bin, payload.bin and residual.bin into the folder, as far as the method has them.

    Args:
        taught: labels that the device was shown; the head's rows of other labels do not travel.
        answers: answers to public texts, which travel as they are.
    """
    trained = {key: factor.detach().float().cpu().numpy() for key, factor in adapter.rows()}
    private = {key: value for key, value in trained.items() if method.factor(key).private}
    if private:
        disk.save(folder / "state.bin", private, tell)
    if not method.exchanges:
        return Sent(0, None)
    delta = {
        key: value
        for key, value in trained.items()
        if method.factor(key).exchanged and (parse(key).kind != "labels" or label_of(key) in taught)
    }
    rank = _subtract_start(delta, method, folder / FILE) if delta else None
    _add_owed(delta, method, carried)
    payload = codec.encode({**delta, **answers.predictions}, answers.completions)
    sent = codec.decode(payload)
    for key, value in delta.items():
        value -= sent.pop(key)
    disk.save(folder / "residual.bin", delta, tell)
    disk.replace(folder / "payload.bin", payload, tell)
    return Sent(len(payload), rank)


def _subtract_start(delta: attach.State, method: Method, path: Path) -> int | None:
    """Subtract the file's factors in place; returns the rank that the method prunes them to."""
    with safe_open(path, framework="np") as start:
        rank = method.next_rank(delta, start.get_tensor) if method.next_rank is not None else None
        for key, value in delta.items():
            value -= start.get_tensor(key)
            if rank is not None:
                sizes = zip(method.factor(key).axes, value.shape, strict=True)
                cut = leading([rank if axis == "rank" else size for axis, size in sizes])
                delta[key] = np.ascontiguousarray(value[cut])
    path.unlink()
    return rank


def _add_owed(delta: attach.State, method: Method, carried: Carried) -> None:
    def add(earlier: attach.State) -> None:
        # after refactoring, a version has its product in other factors: old remainders mean nothing
        valid = {
            key: value
            for key, value in earlier.items()
            if not (method.refactored and parse(key).kind == "layers")
        }
        overlay(delta, valid, method, lambda into, value: np.add(into, value, out=into))

    if carried.residual is not None:
        add(disk.load(carried.residual))
    if carried.unsent is not None:
        add(codec.decode(Path(carried.unsent).read_bytes()))
