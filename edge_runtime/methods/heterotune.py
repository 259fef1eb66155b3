"""heterotune: beside each device's LoRA, branches that all models share in the common frame.

    y = W x + scale · (B A x + G v(F x))
    A, B    their mean inside a model class, as in fedit; of unequal ranks as in unequal.py
    F, G    into the common frame and out of it (frames.py), of the device's own layer; frozen
    v       shared by the whole fleet, one for all layers at about the same relative depth:

    form = "linear"     v(u) = C u
    form = "mixture"    v(u) = Σ_j softmax(w u)_j V_j GELU(U_j u)

C, V and w start at 0, so that a branch changes nothing at first; U is drawn. A mixture is dense: all
J branches run for each token, and the gates are a function of the token.

Across classes (CMGA), for each shared tensor: d_c is the mean of class c's devices, p_c its share of
the rows, and g_-c = Σ_{c' != c} p_c' d_c' / ‖d_c'‖ the direction of the others.

    d_c' = d_c - min(0, <d_c, g_-c>) / ‖g_-c‖² · g_-c
    step = Σ_c p_c d_c' · ‖Σ_c p_c d_c‖ / ‖Σ_c p_c d_c'‖

So a class gives up what is against the other classes, at any negative cosine. `alignment = "off"` is
the plain mean. `steps = "summed"` multiplies the step by the number of classes: where classes move
different parts of a tensor, each part keeps its length.

Controls: `[public] frame = "rotated"` lets the same values cross without a common meaning;
`across = false` shares v inside the class alone.
Source: HeteroTune, arXiv 2411.16796; known is the abstract: a dense mixture of adapters (DeMA) and
an aggregation that harmonises gradient directions across models (CMGA). The equations are ours.
"""

from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

from edge_runtime.methods import unequal
from edge_runtime.methods.fedit import RunningMean
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
)
from edge_runtime.methods.lazy import np, torch

SMALL, TINY = 1e-6, 1e-12


class HeteroTune(MethodSettings, frozen=True):
    """Settings of heterotune."""

    form: Literal["linear", "mixture"] = "linear"  # of the shared branches
    rank: AtLeastOne = 16  # coordinates of the common frame that a branch reads and writes
    branches: AtLeastOne = 4  # of a mixture
    width: AtLeastOne = 16  # hidden units of a mixture's branch
    stages: AtLeastOne = 4  # bins of relative depth that share branches
    alignment: Literal["leave-one-out", "off"] = "leave-one-out"
    steps: Literal["averaged", "summed"] = "averaged"  # of the classes
    across: bool = True  # branches are shared between models

    def method(self) -> Method:
        """The method with these settings."""
        scope: Scope = "fleet" if self.across else "class"
        C = Factor(("branch", "branch"), trained=True, shared=scope, start="zero", of="stages")
        shared = {"C": C}
        if self.form == "mixture":
            shared = {
                "U": C._replace(axes=("hidden", "branch"), start="drawn"),
                "V": C._replace(axes=("branch", "hidden")),
                "w": C._replace(axes=("branches", "branch")),
            }
        sizes = {"branch": self.rank, "branches": self.branches, "hidden": self.branches * self.width}
        return Method(
            "heterotune",
            {"A": A, "B": B, "F": F, "G": G, **shared},
            {
                "layers": unequal.mean,
                "stages": partial(across_classes, alignment=self.alignment, summed=self.steps == "summed"),
            },
            inner=linear if self.form == "linear" else None,
            branch=mixture if self.form == "mixture" else None,
            core=lambda factors, _: None,
            stages=self.stages,
            sizes=lambda rank: sizes,
            unequal="refactored",
            settings=self,
        )


def linear(factors: Mapping[str, Any], _: float) -> Any:
    """The matrix C (rank, rank)."""
    return factors["C"]


def mixture(factors: Mapping[str, Any], u: Any) -> Any:
    """The mixture's output, (..., rank) to (..., rank)."""
    gates = (u @ factors["w"].T).softmax(-1)
    units = torch.nn.functional.gelu(u @ factors["U"].T)
    # each branch's units are neighbours
    return units * gates.repeat_interleave(units.shape[-1] // gates.shape[-1], -1) @ factors["V"].T


def across_classes(contributions: Contributions, alignment: str, *, summed: bool) -> Tensors:
    """The step of each tensor from the classes' means; memory is one running mean a class."""
    running: dict[str, RunningMean] = defaultdict(RunningMean)
    for contribution in contributions():
        running[contribution.model_class].add(contribution)
    means = [(mean, mean.mean()) for _, mean in sorted(running.items())]
    steps: Tensors = {}
    for key in sorted({key for _, deltas in means for key in deltas}):
        holders = [(mean, deltas[key]) for mean, deltas in means if key in deltas]
        rows = np.stack([mean.counts(key).max() for mean, _ in holders])
        deltas = np.stack([delta for _, delta in holders])
        shape = deltas.shape[1:]
        step = combined(deltas.reshape(len(deltas), -1), rows / rows.sum(), alignment)
        steps[key] = step.reshape(shape) * np.float32(len(deltas) if summed else 1)
    return steps


def combined(steps: Array, shares: Array, alignment: str) -> Array:
    """One step (entries,) of classes' steps (classes, entries), by `alignment`."""
    flat = steps.astype(np.float64)
    plain = shares @ flat
    norms = np.linalg.norm(flat, axis=1)
    if alignment == "off":
        return plain.astype(np.float32)
    weighted = (shares / np.maximum(norms, TINY))[:, None] * flat  # a class that did not move: 0
    others = weighted.sum(0) - weighted
    against = (flat * others).sum(1).clip(max=0) / np.maximum((others**2).sum(1), TINY)
    step = shares @ (flat - against[:, None] * others)
    length = float(np.linalg.norm(step))
    opposed = length <= SMALL * norms.max()  # nothing in common but rounding
    return np.float32(step * (0.0 if opposed else np.linalg.norm(plain) / length))


METHOD = HeteroTune().method()
