"""What a federated method is: a statement about each factor, and a merge on the node."""

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Tensors = dict[str, NDArray[np.float32]]


class Factor(NamedTuple):
    """trained: by the device; frozen otherwise. shared: with nobody, within the model class, or across the fleet."""

    trained: bool
    shared: Literal["private", "class", "fleet"]


class Merger(Protocol):
    """A running merge of one round and class: its memory does not grow with the number of updates."""

    def add(self, delta: Mapping[str, NDArray[np.float32]], samples: int) -> None:
        """Take in one device's delta, weighted by the rows it trained on."""

    def merged(self) -> Tensors:
        """What to add to the global version, for every key that some device sent."""


class Method(NamedTuple):
    """factors: by name, A and B (a core C that is not named is the identity). merger: None where nothing is exchanged."""

    name: str
    factors: dict[str, Factor]
    merger: Callable[[], Merger] | None

    def exchanged(self, key: str) -> bool:
        """Whether the factor with this canonical key travels."""
        factor = self.factors[key.rsplit(".", 1)[1]]
        return factor.trained and factor.shared != "private"
