"""What a federated method is: a statement about each factor, and merges on the node.

A tensor's key says what it belongs to and which factor of that it is:

    layers.<i>.<role>.<factor>     a linear layer, by its number in the whole checkpoint
    stages.<s>.<role>.<factor>     all layers at about the same relative depth
    labels.<label>.<factor>        a label that rows are told apart by
    anchors.<label>.<factor>       the same, on the fleet's anchor texts

An agent plans with the statements and never merges, so nothing in this package imports numpy before a merge needs it.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeAlias

import msgspec

from edge_runtime.protocol.keys import leading, name_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

AtLeastOne = Annotated[int, msgspec.Meta(ge=1, le=256)]  # of a method's settings
NotNegative = Annotated[float, msgspec.Meta(ge=0.0, le=1e6)]
Start = Literal["drawn", "zero", "singular"]
Kind = Literal["layers", "stages", "labels", "anchors"]
Scope = Literal["private", "class", "fleet"]  # shared with nobody, within the model class, or with all
Array: TypeAlias = "NDArray[np.float32]"
Tensors: TypeAlias = "dict[str, Array]"
WIDTHS = ("in", "out")  # axes that are as long as a model makes them; the others are the fleet's


def relative_depth(layer: int, layers: int) -> float:
    """Where a layer lies in a checkpoint of so many: 0 for the first, 1 for the last."""
    return layer / max(layers - 1, 1)


def add_to(sums: "Tensors", key: str, value: "Array") -> None:
    """Add to one of several running sums, which takes the array itself for its start."""
    if key in sums:
        sums[key] += value
    else:
        sums[key] = value


class Factor(NamedTuple):
    """axes: what each axis is as long as: "rank", "in" and "out" of the layer, "one", or a name of the method's own sizes.
    trained: by the device; frozen otherwise. start: what it is in version 0, drawn evenly from the fleet's seed or nothing
    (adapters/initial.py), or, where it is frozen, of the layer's own weights (adapters/singular.py). of: what each such tensor
    belongs to.
    anew: whether every round begins it as it was in version 0; the node then keeps none of it."""

    axes: tuple[str, ...]
    trained: bool
    shared: Scope
    start: Start
    of: Kind = "layers"
    anew: bool = False

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The tensor's shape where axes have these sizes."""
        return tuple(sizes[axis] for axis in self.axes)

    @property
    def width(self) -> int:
        """The axis by whose size n drawn values are scaled, to 1/sqrt(n): the layer's own width, else the last."""
        return next((place for place, axis in enumerate(self.axes) if axis in WIDTHS), len(self.axes) - 1)


A = Factor(("rank", "in"), trained=True, shared="class", start="drawn")
B = Factor(("out", "rank"), trained=True, shared="class", start="zero")
C = Factor(("rank", "rank"), trained=True, shared="class", start="zero")


class Contribution(NamedTuple):
    """What a device made of a round. before: the global version that the round started from, of every key in the delta; a
    device of lower rank started from the leading part of it. samples: rows it trained on."""

    before: Mapping[str, Array]
    delta: Mapping[str, Array]
    samples: int
    model_class: str = ""

    def after(self) -> Tensors:
        """What the device held when the round ended, in its own rank."""
        return {key: self.before[key][leading(delta.shape)] + delta for key, delta in self.delta.items()}


# A round's, of one class or of all: they can be gone through more than once, and only one of them is in memory at a time.
Contributions: TypeAlias = Callable[[], Iterable[Contribution]]
# What a round changes, for every key that some device sent: to be added to the global version.
Merge: TypeAlias = Callable[[Contributions], Tensors]


class Pass(NamedTuple):
    """One forward and backward over a step's rows. frozen: factors that stay as they are in it. penalty: joins the loss, of each
    layer's A, C and B now, and its C as the round found it. apart: weight of KL(the first pass's outputs ‖ this one's)."""

    frozen: frozenset[str] = frozenset()
    penalty: Callable[[list[tuple[Any, Any, Any]], list[Any]], Any] | None = None
    apart: float = 0.0


class Method(NamedTuple):
    """factors: A and B, and what else there is, by name; without a C or a core, that is the identity. merges: of each kind of
    tensor that is exchanged. core: makes a layer's C of its factors, which are torch's tensors, and its relative depth. low_rank:
    makes its A and B, where they are not the factors of that name. sizes: of the axes that are the method's own, on a device
    of this rank. unequal: whether devices of lower ranks may take part, which hold the leading rows of A and columns of B.
    refactored: whether a new version has its product in other factors, so that what is owed of an earlier round is worth
    nothing. passes: of each step of a round, counted from 1. pruned: the rank in which a device goes on, any below the fleet's,
    of its exchanged factors after a round and a function that gives one as it was before. completions: with whom a device
    shares how it completes public prompts; None: with nobody.
    """

    name: str
    factors: dict[str, Factor]
    merges: dict[str, Merge]
    core: Callable[[Mapping[str, Any], float], Any] | None = None
    low_rank: Callable[[Mapping[str, Any]], tuple[Any, Any]] | None = None
    sizes: Callable[[int], Mapping[str, int]] = lambda rank: {}
    unequal: bool = False
    refactored: bool = False
    passes: Callable[[int], tuple[Pass, ...]] = lambda round_: (Pass(),)
    pruned: Callable[[Mapping[str, Any], Callable[[str], Any]], int] | None = None
    completions: Literal["class", "fleet"] | None = None

    def keys(self, layer: int, layers: int, role: str) -> dict[str, str]:
        """The canonical key of each factor that a linear layer has, by the factor's name.

        Args:
            layer: its number in the whole checkpoint, which has so many layers.
        """
        stages = self.sizes(1).get("stages", 1)
        stage = min(int(stages * relative_depth(layer, layers)), stages - 1)
        owner = {"layers": f"layers.{layer}", "stages": f"stages.{stage}"}
        return {name: f"{owner[f.of]}.{role}.{name}" for name, f in self.factors.items() if f.of in owner}

    def lengths(self, rank: int, into: int, out: int) -> dict[str, int]:
        """Of every axis that a factor of such a layer has, on a device of this rank."""
        return {**self.sizes(rank), "rank": rank, "in": into, "out": out}

    def product(self, factors: Mapping[str, Any], depth: float) -> tuple[Any, Any, Any]:
        """The A, C and B that a layer at this relative depth, 0 to 1, multiplies; C is None where it is the identity."""
        A, B = factors["A"], factors["B"]
        if self.low_rank is not None:
            A, B = self.low_rank(factors)
        return A, self.core(factors, depth) if self.core is not None else factors.get("C"), B

    def scope(self, kind: str) -> Scope:
        """With whom this kind of tensors is shared, of which some factor travels."""
        return next(
            f.shared for f in self.factors.values() if f.of == kind and f.trained and f.shared != "private"
        )

    @property
    def exchanges(self) -> bool:
        """Whether a device sends anything."""
        return bool(self.merges) or self.completions is not None

    @property
    def reads_weights(self) -> bool:
        """Whether some factor begins as the layers' own weights have it, which have to be in memory then."""
        return any(factor.start == "singular" for factor in self.factors.values())

    @property
    def exchanges_layers(self) -> bool:
        """Whether a linear layer's factors travel, so that they have to fit other devices' models too."""
        return "layers" in self.merges

    def factor(self, key: str) -> Factor:
        """The statement about the factor with this canonical key."""
        return self.factors[name_of(key)]

    def exchanged(self, key: str) -> bool:
        """Whether the factor with this canonical key travels."""
        factor = self.factor(key)
        return factor.trained and factor.shared != "private"

    def kept(self, key: str) -> bool:
        """Whether the device trains the factor for itself alone."""
        factor = self.factor(key)
        return factor.trained and factor.shared == "private"
