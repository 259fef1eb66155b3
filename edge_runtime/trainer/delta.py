"""The adapter's factors as a round begins, and what the trained round leaves behind.

    start                version 0, overlaid by the global version, and by earlier private factors
    private factors      state.bin
    exchanged factors    delta = trained - start + owed
                         payload.bin = encode(delta)        residual.bin = delta - decode(payload)
    factors of peers     state.bin, and their values in payload.bin; nothing is owed
    entries that do not train (Factor.chosen)
                         0 in payload.bin, which has the rank; owed ones stay in residual.bin

Owed are the residual of the last settled round and a payload that the node refused. The exchanged
factors of the start lie in a file while they train. The trained factors become delta and then
residual in place: only one copy of the adapter's size exists.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import safe_open

from edge_runtime.adapters import attach
from edge_runtime.methods.interface import WIDTHS, Method
from edge_runtime.protocol import codec
from edge_runtime.protocol.keys import label_of, leading, parse
from edge_runtime.trainer import disk
from edge_runtime.trainer.job import Job
from edge_runtime.trainer.public import DeviceAnswers

START = "start.bin"


class Sent(NamedTuple):
    """The payload of a round."""

    payload_bytes: int  # 0: the method exchanges nothing
    rank: int | None  # in which the device goes on; None: the method does not prune


def start(
    adapter: attach.Attached, shared: attach.State, private: str | None, method: Method, share: float
) -> attach.State:
    """Set the adapter, which is at version 0, to the round's start; returns that state.

    Args:
        shared: the global version; it may have factors that this device has not.
        private: path of an earlier round's state.bin.
        share: the device's rank, as a share of the fleet's.

    Raises:
        InputError: the files do not fit the adapter.
    """
    state = attach.state(adapter)
    for key, value in shared.items():
        if key in state:
            state[key] = value[leading(state[key].shape)] if method.unequal else value
    if private is not None:
        _overlay(state, disk.load(private), method, np.copyto)
    attach.load_state(adapter, state)
    for key in adapter.factors if share < 1 else ():
        if (chosen := method.factor(key).chosen) is not None:
            adapter.train_part(key, chosen(state[key], share))
    return state


def sent_before(job: Job) -> attach.State:
    """What this device sent of its own to the version that the job starts from."""
    if job.carried.sent is None:
        return {}
    return codec.decode(Path(job.carried.sent).read_bytes(), lambda key: parse(key).kind == "peers")


def put_aside(state: attach.State, method: Method, folder: Path, tell: disk.Tell) -> None:
    """Move the exchanged factors to a file and empty the state; the private ones are not needed again."""
    exchanged = {key: value for key, value in state.items() if method.factor(key).exchanged}
    if exchanged:
        disk.save(folder / START, exchanged, tell)
    state.clear()


def write(
    folder: Path,
    adapter: attach.Attached,
    method: Method,
    taught: set[str],
    answers: DeviceAnswers,
    job: Job,
    tell: disk.Tell,
) -> Sent:
    """Write state.bin, payload.bin and residual.bin into the folder, as far as the method has them.

    Args:
        taught: labels that the device was shown; the head's rows of other labels do not travel.
        answers: answers to public texts, of which nothing is owed.
        job: what earlier rounds have left, and the fleet's codec.
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
        if method.factor(key).exchanged
        and not method.factor(key).whole
        and (parse(key).kind != "labels" or label_of(key) in taught)
    }
    values = {key: value for key, value in trained.items() if method.factor(key).whole}
    rank = _subtract_start(delta, method, folder / START) if delta else None
    for key in delta.keys() & adapter.parts.keys():
        delta[key] *= adapter.parts[key]  # weight decay has moved the other entries
    if job.carried.residual is not None:
        _add_owed(delta, disk.load(job.carried.residual), method)
    if job.carried.unsent is not None:
        _add_owed(delta, codec.decode(Path(job.carried.unsent).read_bytes()), method)
    step = method.codec_step(job.fleet)
    parts = {key: delta[key] * adapter.parts[key] for key in delta.keys() & adapter.parts.keys()}
    tensors = {**delta, **parts, **values, **answers.predictions}
    payload = codec.encode(tensors, answers.completions, step, job.plan.rank if parts else 0)
    sent = codec.decode(payload)
    for key, value in delta.items():
        value -= sent.pop(key)
    disk.save(folder / "residual.bin", delta, tell)
    disk.save(folder / "payload.bin", payload, tell)
    return Sent(len(payload), rank)


def write_answers(folder: Path, answers: DeviceAnswers, tell: disk.Tell) -> Sent:
    """Write a payload.bin that has no delta."""
    payload = codec.encode(answers.predictions, answers.completions)
    disk.save(folder / "payload.bin", payload, tell)
    return Sent(len(payload), None)


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


def _add_owed(delta: attach.State, owed: attach.State, method: Method) -> None:
    # after refactoring, a version has its product in other factors: old remainders mean nothing
    valid = {
        key: value for key, value in owed.items() if not (method.refactored and parse(key).kind == "layers")
    }
    _overlay(delta, valid, method, lambda into, value: np.add(into, value, out=into))


def _overlay(state: attach.State, earlier: attach.State, method: Method, put: Callable[..., object]) -> None:
    """Put factors of an earlier round into the state, in place, with put(into, values).

    The plan may have changed since then. Factors of absent layers are left out, another rank gives
    its leading part, and factors of another width are left out: they belong to another model.
    """
    for key in earlier.keys() & state.keys():
        old, new = earlier[key].shape, state[key].shape
        same_model = all(
            axis not in WIDTHS or before == after
            for axis, before, after in zip(method.factor(key).axes, old, new, strict=True)
        )
        if same_model:
            # the ranks may differ
            common = leading(tuple(map(min, new, old)))
            put(state[key][common], earlier[key][common])
