"""What a backend does for serving: it holds a base model, and continues sequences of tokens on it.

    engine.swap(learned)         new sequences take this adapter; those that run keep theirs
    sequence = engine.begin()    no tokens yet
    sequence.feed(ids)           appends tokens, and gives the logits that follow the last of them

Sampling, text and queues are the same for every backend and lie in the other files of this room.
"""

from collections.abc import Sequence as Ids
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edge_runtime.adapters.learned import Learned, on
from edge_runtime.errors import InputError
from edge_runtime.models.facts import Facts
from edge_runtime.models.slices import kept_layers


class Sequence(Protocol):
    """Tokens with their keys and values, on the adapter that was the newest when the sequence began."""

    version: int  # of the adapter; 0: the base alone

    def feed(self, ids: Ids[int]) -> NDArray[np.float32]:
        """Append one token or more, PIECE at most; the logits (vocabulary,) of the token that comes next."""


class Engine(Protocol):
    """A base model. One thread begins and feeds sequences; another may swap meanwhile."""

    positions: int  # tokens that a sequence may have

    @property
    def version(self) -> int:
        """Of the adapter that a new sequence takes; 0: the base alone."""

    def begin(self) -> Sequence:
        """A sequence without tokens, on the newest adapter."""

    def swap(self, learned: Learned) -> None:
        """Give new sequences another adapter.

        Raises:
            InputError: the adapter was learned on another checkpoint or slice.
        """


def depth_of(facts: Facts, learned: Learned | None) -> int:
    """Layers of the checkpoint that the base of an adapter keeps; all of them without an adapter.

    Raises:
        InputError: the adapter was learned on another checkpoint, or on layers that are no slice.
    """
    if learned is None:
        return facts.layers
    depth = len(on(learned, facts).layers)
    if not 1 <= depth <= facts.layers or learned.layers != kept_layers(depth, facts.layers):
        raise InputError(
            f"the adapter was learned on the layers {learned.layers}, which are no slice of {facts.model_class}"
        )
    return depth


def require_depth(facts: Facts, learned: Learned, depth: int) -> None:
    """Raise InputError where an adapter was learned on another base than `depth` layers of this one."""
    if depth_of(facts, learned) != depth:
        raise InputError(
            f"version {learned.version} was learned on {len(learned.layers)} layers, but the base that is "
            f"loaded has {depth}: start the server again"
        )
