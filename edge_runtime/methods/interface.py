"""What a federated method is: a statement about each factor, and a merge on the node.

An agent plans with the statements and never merges, so nothing in this package imports numpy before a merge needs it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Start = Literal["drawn", "zero"]
Array: TypeAlias = "NDArray[np.float32]"
Tensors: TypeAlias = "dict[str, Array]"


def factor_shape(key: str, rank: int, into: int, out: int) -> tuple[int, int]:
    """Of A (rank, in), B (out, rank) or C (rank, rank), which a key ends with."""
    return {"A": (rank, into), "B": (out, rank), "C": (rank, rank)}[key[-1]]


def width_axis(key: str) -> int:
    """The axis of a factor that is as long as its layer is wide; both of C are its rank."""
    return 0 if key.endswith("B") else 1


def leading(shape: Sequence[int]) -> tuple[slice, ...]:
    """Where a factor of a lower rank has its values in one of a higher."""
    return tuple(map(slice, shape))


def add_to(sums: "Tensors", key: str, value: "Array") -> None:
    """Add to one of several running sums, which takes the array itself for its start."""
    if key in sums:
        sums[key] += value
    else:
        sums[key] = value


class Factor(NamedTuple):
    """trained: by the device; frozen otherwise. shared: with nobody, within the model class, or across the fleet. start: what
    it is in version 0, drawn evenly from the fleet's seed or nothing (adapters/initial.py)."""

    trained: bool
    shared: Literal["private", "class", "fleet"]
    start: Start


class Contribution(NamedTuple):
    """What a device made of a round. before: the global version that the round started from, of every key in the delta; a
    device of lower rank started from the leading part of it. samples: rows it trained on."""

    before: Mapping[str, Array]
    delta: Mapping[str, Array]
    samples: int

    def after(self) -> Tensors:
        """What the device held when the round ended, in its own rank."""
        return {key: self.before[key][leading(delta.shape)] + delta for key, delta in self.delta.items()}


# A round's, of one class: they can be gone through more than once, and only one of them is in memory at a time.
Contributions: TypeAlias = Callable[[], Iterable[Contribution]]
# What a round of one class changes, for every key that some device sent: to be added to the global version.
Merge: TypeAlias = Callable[[Contributions], Tensors]


class Method(NamedTuple):
    """factors: A and B, and C where there is a core between them; else that is the identity. merge: None where nothing is
    exchanged. unequal: whether devices of lower ranks may take part, which hold the leading rows of A and columns of B.
    refactored: whether a new version has its product in other factors, so that what is owed of an earlier round is worth nothing.
    """

    name: str
    factors: dict[str, Factor]
    merge: Merge | None
    unequal: bool = False
    refactored: bool = False

    def exchanged(self, key: str) -> bool:
        """Whether the factor with this canonical key travels."""
        factor = self.factors[key[-1]]
        return factor.trained and factor.shared != "private"

    def kept(self, key: str) -> bool:
        """Whether the device trains the factor for itself alone."""
        factor = self.factors[key[-1]]
        return factor.trained and factor.shared == "private"
