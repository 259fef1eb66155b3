"""A federated method: a statement about each factor, and a merge for each kind of tensor.

    y = W x + (alpha / rank) · B · C · A · x      A: rank x in    C: rank x rank    B: out x rank

Devices plan with the statements and never merge, so NumPy loads when a merge needs it (lazy.py).
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeAlias

import msgspec

from edge_runtime.methods.lazy import np, torch
from edge_runtime.protocol.keys import Kind, join, leading, parse
from edge_runtime.settings import FINE_STEP, Fleet

if TYPE_CHECKING:
    from numpy.typing import NDArray

AtLeastOne = Annotated[int, msgspec.Meta(ge=1, le=256)]  # types of a method's settings
NotNegative = Annotated[float, msgspec.Meta(ge=0.0, le=1e6)]
Start = Literal["drawn", "zero", "singular", "aligned"]
Scope = Literal["private", "class", "fleet"]
# How a merge changes a version: it adds a mean of the devices' deltas; it also lets entries shrink
# that some devices do not hold; or it writes the merged product in new factors.
Step = Literal["mean", "shrinking", "refactored"]
Array: TypeAlias = "NDArray[np.float32]"
Tensors: TypeAlias = "dict[str, Array]"
Entries: TypeAlias = "NDArray[np.bool_]"  # of a tensor, in its shape
Product: TypeAlias = tuple[Any, Any | None, Any]  # A, C and B; C is None where it is the identity
# What a coarse step leaves over costs accuracy until later rounds have sent it: a fleet of fewer
# rounds takes a finer step.
ROUNDS_OF_A_COARSE_STEP = 4
COARSE_STEP, MIDDLE_STEP = 1.5, 0.5
WIDTHS = ("in", "out")  # axes whose length the model decides; the fleet decides the others


def relative_depth(layer: int, layers: int) -> float:
    """Position of a layer in a checkpoint of this many: 0 for the first, 1 for the last."""
    return layer / max(layers - 1, 1)


def stream(name: str) -> "np.random.Generator":
    """Random numbers of a name: the same on every machine, whatever was drawn before."""
    digest = hashlib.sha256(name.encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def add_to(sums: "Tensors", key: str, value: "Array") -> None:
    """Add to a running sum, in place: a new array for each device would cost the merge a third more time.

    The first value becomes the sum itself, without a copy.
    """
    if key in sums:
        sums[key] += value
    else:
        sums[key] = value


class Factor(NamedTuple):
    """A statement about one factor of the adapter."""

    axes: tuple[str, ...]  # each axis is "rank", "in", "out", "one", or a name of Method.sizes
    trained: bool  # by the device; a factor that is not trained is frozen
    shared: Scope  # with nobody, inside the model class, or with the whole fleet
    # version 0: zero, drawn from the fleet's seed, the layer's singular vectors, or zero until the
    # class is in the common frame (frames.py)
    start: Start
    of: Kind = "layers"  # the kind of place that has such a factor
    # The entries that a device trains, of the factor as the round starts, and of the device's rank as
    # a share of the fleet's, below 1. Node and device call it with the same numbers. None: all.
    chosen: Callable[[Array, float], Entries] | None = None

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The tensor's shape where axes have these sizes."""
        return tuple(sizes[axis] for axis in self.axes)

    @property
    def exchanged(self) -> bool:
        """Whether devices send it."""
        return self.trained and self.shared != "private"

    @property
    def whole(self) -> bool:
        """Whether devices send its values, of which nothing is owed, and go on with their own."""
        return self.exchanged and self.of == "peers"

    @property
    def private(self) -> bool:
        """Whether a device goes on with its own values."""
        return self.whole or (self.trained and self.shared == "private")


A = Factor(("rank", "in"), trained=True, shared="class", start="drawn")
B = Factor(("out", "rank"), trained=True, shared="class", start="zero")
C = Factor(("rank", "rank"), trained=True, shared="class", start="zero")


class Contribution(NamedTuple):
    """One device's part of a round."""

    # The version that the round started from, of every key in the delta, in the fleet's full rank;
    # a device of lower rank started from the leading part.
    before: Mapping[str, Array]
    delta: Mapping[str, Array]
    samples: int  # rows that the device trained on
    model_class: str = ""
    # The entries that the device trained, of tensors that it trained in part.
    parts: Mapping[str, Entries] = MappingProxyType({})

    def after(self) -> Tensors:
        """The factors that the device held when the round ended, in its own rank."""
        return {key: self.before[key][leading(delta.shape)] + delta for key, delta in self.delta.items()}


def layer_factors(state: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """The place, A and B of each layer that has both."""
    for key, A in state.items():
        parsed = parse(key)
        if parsed.factor == "A" and (B := state.get(join(parsed.place, "B"))) is not None:
            yield parsed.place, A, B


# The contributions of a round or a class, one in memory at a time; each call starts again.
Contributions: TypeAlias = Callable[[], Iterable[Contribution]]
# The change of the global version, for every key that some device sent.
Merge: TypeAlias = Callable[[Contributions], Tensors]


class Pass(NamedTuple):
    """One forward and backward pass over a step's rows."""

    frozen: frozenset[str] = frozenset()  # names of factors that stay as they are in this pass
    # Added to the loss. Takes each layer's A, C and B now, once, and each layer's C as the round started.
    penalty: Callable[[Iterable[Product], list[Any]], Any] | None = None
    apart: float = 0.0  # weight of KL(outputs of the first pass ‖ outputs of this pass)


class PublicAnswers(NamedTuple):
    """Answers to the fleet's public prompts, which devices send beside their tensors, as bytes."""

    shared: Scope
    check: Callable[[bytes], None]  # raises InputError where a device's bytes are not acceptable
    # The fleet's bytes, from pairs of a device's rows and its bytes, which it may read twice.
    merge: Callable[[Callable[[], Iterable[tuple[int, bytes]]]], bytes]


class MethodSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Settings of a method that has any, as the table [method] of a fleet file gives them."""

    def method(self) -> "Method":
        """The method with these settings."""
        raise NotImplementedError


class Method(NamedTuple):
    """A federated method: data, and a few functions that have a default."""

    name: str
    factors: dict[str, Factor]  # by name; A and B always
    merges: dict[str, Merge]  # for each kind of tensor that devices exchange
    # Returns C of a layer, from its factors (torch tensors) and its relative depth; None: the identity.
    core: Callable[[Mapping[str, Any], float], Any] = lambda factors, depth: factors.get("C")
    kept: int = 0  # rank of the frozen factors keptA and keptB, which lie beside A and B; 0: none
    # A branch between a layer's frozen factors F and G, which lie beside A and B: its matrix, from
    # the factors and the relative depth; or a function of the factors and u = F x, (..., branch).
    inner: Callable[[Mapping[str, Any], float], Any] | None = None
    branch: Callable[..., Any] | None = None
    # A number for each row (rows, 1, 1), which `branch` takes as its third argument: of the factors
    # and the layer's mean input (rows, 1, in) over the row's prompt.
    gate: Callable[[Mapping[str, Any], Any], Any] | None = None
    # Turns a version's tensors into what this device loads of them, in place; its second argument
    # has what the device sent to that version.
    received: Callable[[Tensors, Mapping[str, Any]], None] | None = None
    stages: int = 1  # bins of relative depth, whose layers share the factors of kinds `stages` and `peers`
    # The lengths of the method's own axes, on a device of a rank.
    sizes: Callable[[int], Mapping[str, int]] = lambda rank: {}
    step: Step = "mean"
    # The step where devices of lower ranks take part, which hold leading rows of A and columns of B;
    # None: they may not.
    unequal: Step | None = None
    nested: bool = False  # steps take turns in the fleet's lower ranks
    # The passes of each step, by round from 1.
    passes: Callable[[int], tuple[Pass, ...]] = lambda round_: (Pass(),)
    # The rank in which a device goes on, from its exchanged factors and a function that gives a
    # factor as the round started. None: the device's plan decides, with the ranks of the fleet.
    next_rank: Callable[[Mapping[str, Any], Callable[[str], Any]], int] | None = None
    answers: PublicAnswers | None = None
    settings: MethodSettings | None = None

    def keys(self, layer: int, layers: int, role: str) -> dict[str, str]:
        """The canonical key of each factor of a linear layer, by the factor's name.

        Args:
            layer: the layer's number in the checkpoint.
            layers: how many layers the checkpoint has.
        """
        stage = min(int(self.stages * relative_depth(layer, layers)), self.stages - 1)
        numbers = {"layers": layer, "stages": stage, "peers": stage}
        return {
            name: join(factor.of, numbers[factor.of], role, name)
            for name, factor in self.factors.items()
            if factor.of in numbers
        }

    def lengths(self, rank: int, into: int, out: int) -> dict[str, int]:
        """The length of every axis of a layer's factors, on a device of this rank."""
        return {**self.sizes(rank), "rank": rank, "kept": self.kept, "in": into, "out": out}

    def turns(self, rank: int, lower: Iterable[int]) -> tuple[int | None, ...]:
        """Leading ranks that the steps of a device take in turn; None: its whole rank.

        lower: the fleet's lower ranks.
        """
        return (None, *(each for each in lower if self.nested and each < rank))

    def product(self, factors: Mapping[str, Any], depth: float) -> Product:
        """A, C and B of a layer, with what lies beside A and B, from its factors (torch) and relative depth."""
        A, B = factors["A"], factors["B"]
        if self.kept:
            A, B = torch.cat([factors["keptA"], A]), torch.cat([factors["keptB"], B], 1)
        core = self.core(factors, depth)
        if self.inner is None:
            return A, core, B
        first = torch.eye(len(A), device=A.device) if core is None else core
        core = torch.block_diag(first, self.inner(factors, depth))
        return torch.cat([A, factors["F"]]), core, torch.cat([B, factors["G"]], 1)

    def scope(self, kind: str) -> Scope:
        """With whom devices share tensors of this kind, which the method exchanges."""
        return next(
            factor.shared for factor in self.factors.values() if factor.of == kind and factor.exchanged
        )

    def factor(self, key: str) -> Factor:
        """The statement about the factor with this canonical key."""
        return self.factors[parse(key).factor]

    def codec_step(self, fleet: Fleet) -> float:
        """The codec's step for what the fleet's devices send and get."""
        few = fleet.rounds < ROUNDS_OF_A_COARSE_STEP
        step = fleet.codec.step or (MIDDLE_STEP if few else COARSE_STEP)
        return min(step, FINE_STEP) if self.refactored else step

    @property
    def exchanges(self) -> bool:
        """Whether a device sends anything."""
        return bool(self.merges) or self.answers is not None

    @property
    def aligned(self) -> bool:
        """Whether some factor starts from the common frame, so that the fleet needs public texts."""
        return any(factor.start == "aligned" for factor in self.factors.values())

    @property
    def framed(self) -> bool:
        """Whether devices send features for the common frame (frames.py)."""
        return "frame" in self.merges

    @property
    def refactored(self) -> bool:
        """Whether residuals are worthless, as a version has its product in new factors."""
        return self.step == "refactored"

    @property
    def reads_weights(self) -> bool:
        """Whether some factor starts from the layers' own weights, which must be in memory."""
        return any(factor.start == "singular" for factor in self.factors.values())
