"""Checks a delta, and merges a round: class by class, one update in memory at a time.

    master_r = master_{r-1} + merged(deltas)        published: encode(master_r), which devices decode and start from

The master stays in float32, so rounding what is published does not add up over rounds.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np
from edge_broker.journal import Update
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from edge_runtime import codec
from edge_runtime.adapters.initial import initial
from edge_runtime.aggregator.store import Version
from edge_runtime.errors import InputError
from edge_runtime.methods.interface import Contribution, Method, factor_shape, width_axis
from edge_runtime.settings import Fleet

KEY = re.compile(r"layers\.(0|[1-9][0-9]{0,3})\.([a-z0-9_]+)\.([A-Z])")
WIDEST = 1 << 20  # rows or columns of a factor
LARGEST_ADAPTER = 1 << 28  # values
LARGEST_NORM = 1e4  # of one factor's delta; a trained one has a few units


def check(payload: bytes, known: Mapping[str, tuple[int, ...]], fleet: Fleet, method: Method) -> codec.Tensors:
    """Decode a device's delta if nothing is wrong with it.

    Args:
        known: keys and shapes that other devices of the class have sent.

    Raises:
        InputError: a key, a shape or a value that does not fit the fleet's adapter; it is named.
    """
    _check_shapes(codec.shapes(payload), known, fleet, method)
    delta = codec.decode(payload)
    for key, value in delta.items():
        norm = float(np.linalg.norm(value))
        if norm > LARGEST_NORM:
            raise InputError(
                f"{key} changed by a norm of {norm:.3g}, more than {LARGEST_NORM:g}: the training diverged"
            )
    return delta


def _check_shapes(
    shapes: Mapping[str, tuple[int, ...]], known: Mapping[str, tuple[int, ...]], fleet: Fleet, method: Method
) -> None:
    """Refuse what is no adapter of this fleet; the node holds no model, so what a class's first device sent is the measure."""
    adapter, ranks = fleet.adapter, set()
    if not shapes:
        raise InputError("the delta holds no factor")
    for key, shape in shapes.items():
        parts = KEY.fullmatch(key)
        if not parts or parts[2] not in adapter.roles or parts[3] not in method.factors or not method.exchanged(key):
            raise InputError(f"the delta holds {key[:80]}, which this fleet's adapter does not exchange")
        across = width_axis(key)
        rank, wide = (shape[1 - across], shape[across]) if len(shape) == 2 else (0, 0)
        needed = rank if parts[3] == "C" else known[key][across] if key in known else wide
        if rank not in (adapter.rank, *adapter.lower) or wide != needed or not 1 <= wide <= WIDEST:
            of = f"of rank {' or '.join(map(str, (adapter.rank, *adapter.lower)))}"
            of += f", for a layer {known[key][across]} wide" if key in known else ""
            raise InputError(f"{key} is {shape} in the delta, but has to be {of}")
        ranks.add(rank)
    if len(ranks) > 1:
        raise InputError(f"the delta has factors of ranks {sorted(ranks)}, but one device has one")
    full = -(-adapter.rank // min(ranks))  # a merge has them in the fleet's rank
    if full * sum(rows * columns for rows, columns in shapes.values()) > LARGEST_ADAPTER:
        raise InputError(f"the delta has more than {LARGEST_ADAPTER} values")


def merge(
    updates: list[Update], masters: Mapping[str, Version], fleet: Fleet, method: Method, round_: int, folder: Path
) -> list[Version]:
    """The global version of every class after a round.

    Args:
        updates: the committed ones of the round; their content was checked before.
        masters: the versions before the round.
        folder: where the new versions are written.
    """
    assert method.merge is not None
    folder.mkdir(parents=True, exist_ok=True)
    versions = []
    for model_class in sorted({update.manifest.model_class for update in updates}):
        own = [update for update in updates if update.manifest.model_class == model_class]
        state = load_file(masters[model_class].master) if model_class in masters else {}
        for key, step in method.merge(partial(_contributions, own, state, fleet, method)).items():
            state[key] += step
        versions.append(_write(model_class, state, round_, folder))
    return versions


def _contributions(
    updates: list[Update], before: dict[str, NDArray[np.float32]], fleet: Fleet, method: Method
) -> Iterator[Contribution]:
    """The updates one after another; what no version has yet is put into `before` when it is first met."""
    for update in updates:
        delta = codec.decode(update.payload.read_bytes())
        for key, value in delta.items():
            if key not in before:
                before[key] = _version_0(key, value.shape, fleet, method)
        yield Contribution(before, delta, update.manifest.samples)


def _version_0(key: str, shape: tuple[int, ...], fleet: Fleet, method: Method) -> NDArray[np.float32]:
    """What a factor starts from, in the fleet's full rank, whichever the device has."""
    width = shape[width_axis(key)]
    full = factor_shape(key, fleet.adapter.rank, width, width)
    return initial(key, full, fleet.seed, method.factors[key[-1]].start)


def _write(model_class: str, state: dict[str, NDArray[np.float32]], round_: int, folder: Path) -> Version:
    name = f"{round_:05d}-{hashlib.sha256(model_class.encode()).hexdigest()[:12]}"
    version = Version(model_class, folder / f"{name}.safetensors", folder / f"{name}.edc")
    for path in (version.master, version.artifact):
        part = path.with_suffix(".part")
        if path is version.master:
            save_file(state, part)
        else:
            part.write_bytes(codec.encode(state))
        part.replace(path)
    return version
