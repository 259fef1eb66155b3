"""Stage "start state": the adapter's factors as the round begins.

It is version 0, overlaid by the global version, and then by the private factors of earlier rounds.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from edge_runtime.adapters import attach
from edge_runtime.methods.interface import WIDTHS, Method
from edge_runtime.protocol.keys import leading
from edge_runtime.trainer import disk

# the exchanged factors lie here while they train; in memory they would cost one adapter more
FILE = "start.bin"


def start_state(
    initial: attach.State, shared: attach.State, private: str | None, method: Method
) -> attach.State:
    """The state that a round starts from.

    Args:
        initial: version 0, of every factor.
        shared: the global version; it may have factors that this device has not.
        private: path of an earlier round's state.bin.

    Raises:
        InputError: the files do not fit the adapter.
    """
    state = dict(initial)
    for key, value in shared.items():
        if key in state:
            state[key] = value[leading(initial[key].shape)] if method.unequal else value
    if private is not None:
        overlay(state, disk.load(private), method, np.copyto)
    attach.check_keys(state, {key: value.shape for key, value in initial.items()})
    return state


def overlay(state: attach.State, earlier: attach.State, method: Method, put: Callable[..., object]) -> None:
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


def put_aside(start: attach.State, method: Method, folder: Path, tell: disk.Tell) -> None:
    """Move the exchanged factors to a file and empty start; the private ones are not needed again."""
    exchanged = {key: value for key, value in start.items() if method.factor(key).exchanged}
    if exchanged:
        disk.save(folder / FILE, exchanged, tell)
    start.clear()
