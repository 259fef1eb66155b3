"""colora: beside each device's LoRA, what the other devices have learned, let in by a gate.

    y = W x + scale · (B A x + G (g O u + (1 - g) R u))        u = (F x, 1)
    A, B    their mean inside a model class, as in fedit
    F, G    into the common frame and out of it (frames.py), of the device's own layer; frozen
    R       (r, r + 1): the device's own map and offset, one for all layers at about the same
            relative depth; trained
    O       (r, r + 1): the mean of R over the other devices; frozen
    g       sigmoid(w · m), a number for each row and layer; m: the layer's mean input over the
            row's prompt; w is trained and private

R, O and w start at 0, so that the branches change nothing at first. The prompt ends before the
first learned token, so that no answer opens a gate of its own; of a row whose label a head learns,
every token counts, and padding never does.

A device goes on with its own R, and sends its values. O differs between devices, but a version is
the same for all, so each device takes itself out of it:

    version     O = Σ_k R_k / N over the N devices of the last round that hold the tensor
    device i    O_i = (N O - R_i) / (N - 1) where it was one of the N, and O where it was not

Controls: `[public] frame = "rotated"` lets the same values cross without a common meaning;
`across = false` takes O from the model class alone; `others = "drawn"` puts random values of O's
size in its place; `gate = "closed"` is g = 0, with which nothing of the others is let in.

A gate needs whole rows: an MLP in tiles and an answer that is written token by token have none, and
are refused. With `gate = "closed"` both can be had.
Source: Co-LoRA of FedMosaic, arXiv 2506.11024, and its released code: the gate, both branches
between frozen factors, the start, and that a device's own part is never in the mean. In place of
factors of a larger model that are fitted to a smaller one's, F and G lead into one frame for any
number of models. All other devices count alike, where the source weighs them by the similarity of
gradients of a small model that all have. The source has its branches in the last layer of each of
four blocks and LoRAs in the other layers; here each layer has both. The source's gate also reads
answers and padding, and has noise added while it trains.
"""

from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

from edge_runtime.methods import unequal
from edge_runtime.methods.frames import F, G
from edge_runtime.methods.interface import (
    A,
    Array,
    AtLeastOne,
    B,
    Contributions,
    Factor,
    Method,
    MethodSettings,
    Scope,
    Tensors,
    stream,
)
from edge_runtime.methods.lazy import np, torch
from edge_runtime.protocol.keys import join, parse


class CoLora(MethodSettings, frozen=True):
    """Settings of colora."""

    rank: AtLeastOne = 16  # coordinates of the common frame that the branches read and write, r
    stages: AtLeastOne = 4  # bins of relative depth whose layers share R and O
    across: bool = True  # O is of devices of all models
    others: Literal["mean", "drawn"] = "mean"  # values of O
    gate: Literal["trained", "closed"] = "trained"

    def method(self) -> Method:
        """The method with these settings."""
        scope: Scope = "fleet" if self.across else "class"
        R = Factor(("branch", "affine"), trained=True, shared=scope, start="zero", of="peers")
        factors = {
            "R": R,
            "O": R._replace(trained=False),
            "N": R._replace(axes=("one",), trained=False),
            "w": Factor(("in",), trained=True, shared="private", start="zero"),
        }
        sizes = {"branch": self.rank, "affine": self.rank + 1, "one": 1}
        return Method(
            "colora",
            {"A": A, "B": B, "F": F, "G": G, **factors},
            {"layers": unequal.mean, "peers": mean_of_devices},
            branch=gated if self.gate == "trained" else closed,
            gate=opening if self.gate == "trained" else None,
            received=partial(of_the_others, drawn=self.others == "drawn"),
            stages=self.stages,
            sizes=lambda rank: sizes,
            unequal="refactored",
            settings=self,
        )


def opening(factors: Mapping[str, Any], mean: Any) -> Any:
    """g (rows, 1, 1) of the layer's mean inputs (rows, 1, in)."""
    return (mean @ factors["w"][:, None]).sigmoid()


def gated(factors: Mapping[str, Any], u: Any, gate: Any) -> Any:
    """The output of both branches, (rows, tokens, r) to the same; u without its 1."""
    return gate * _affine(factors["O"], u) + (1 - gate) * _affine(factors["R"], u)


def closed(factors: Mapping[str, Any], u: Any) -> Any:
    """The output of the device's own branch, (..., r) to the same."""
    return _affine(factors["R"], u)


def _affine(map_: Any, u: Any) -> Any:
    return torch.nn.functional.linear(u, map_[:, :-1], map_[:, -1])


def mean_of_devices(contributions: Contributions) -> Tensors:
    """The steps to a round's O and N from those of the round before."""
    sums: Tensors = {}
    counts: Counter[str] = Counter()
    before: Mapping[str, Array] = {}
    for contribution in contributions():
        before = contribution.before
        for key, value in contribution.delta.items():
            place = parse(key).place
            sums[place] = sums.get(place, 0) + value
            counts[place] += 1
    steps = {}
    for place, total in sums.items():
        mean, count = total / np.float32(counts[place]), np.array([counts[place]], np.float32)
        for key, value in ((join(place, "O"), mean), (join(place, "N"), count)):
            steps[key] = value - before.get(key, np.float32(0))
    return steps


def of_the_others(version: Tensors, sent: Mapping[str, Array], *, drawn: bool) -> None:
    """Take this device's R out of each O of a version, in place. drawn: put random values of that size there."""
    for key in [key for key in version if parse(key)[::3] == ("peers", "O")]:
        place = parse(key).place
        R, count = sent.get(join(place, "R")), round(float(version[join(place, "N")][0]))
        others = count - (R is not None)
        total = count * version[key] - (0 if R is None else R)
        version[key] = np.float32(others > 0) * total / np.float32(max(others, 1))
        if drawn:
            size = np.sqrt(np.square(version[key]).mean())
            version[key] = size * stream(key).standard_normal(version[key].shape, np.float32)


METHOD = CoLora().method()
