"""heterotune: branches between A and B that all models share, merged without conflicts.

    y = W x + scale · B C A x        C = I + Σ_j g_j V_j U_j,  g = J · softmax of J gates
    A, B     their mean inside a model class, as in fedit; of unequal ranks as in unequal.py
    U, V     (m x r), (r x m) of branch j, one pair for all layers at about the same relative depth,
             across the fleet
    gates    of each layer, private

All branches run: there is no router, and no token is dropped. A device holds the first branches, as
many as its rank has room for; each entry is averaged over the devices that hold it. U is drawn, V
and the gates start at 0, so that C starts as the identity and a branch counts the same on devices
of few and of many branches.

Across classes (CMGA), for each of U and V: d_c is the mean of class c's devices, p_c its share of
the rows (of the rows behind the entry that most of its devices hold), and

    g = Σ_c p_c d_c / ‖d_c‖,   d_c' = d_c - min(0, <d_c, g>) / ‖g‖² · g
    step = Σ_c p_c d_c' · ‖Σ_c p_c d_c‖ / ‖Σ_c p_c d_c'‖

This changes the plain mean where <d_c, g> < 0: with two classes, where their cosine is below -p_1 /
p_2. Two classes of equal shares are never against g. `alignment` chooses the rule:

    projection  the equation above
    pairwise    subtract from each d_c its part against any other class's d (FedGH)
    cagrad      the step of conflict-averse gradients; with one class, 1 + CAGRAD_C times its step
    gate        the plain mean of a tensor of n values where the cosine of each d_c with the other
                classes' common direction exceeds 2 / √n, twice the chance level, over the entries
                that all classes hold; elsewhere no step
    off         the plain mean

Two controls: `across = false` shares U and V inside the class only; `core = "frozen"` draws U and V
and trains neither.
Source: HeteroTune, arXiv 2411.16796; known is the abstract: a dense mixture of adapters (DeMA) and
an aggregation that harmonises gradient directions across models (CMGA). The equations are ours.
Variants: FedGH, arXiv 2309.06692; Yu et al. 2020, arXiv 2001.06782; Liu et al. 2021, arXiv
2110.14048.
"""

from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from itertools import permutations
from typing import Any, Literal

from edge_runtime.methods import unequal
from edge_runtime.methods.fedit import RunningMean
from edge_runtime.methods.interface import (
    A,
    Array,
    AtLeastOne,
    B,
    Contributions,
    Factor,
    Merge,
    Method,
    MethodSettings,
    Scope,
    Tensors,
)
from edge_runtime.methods.lazy import np, torch

Alignment = Literal["projection", "pairwise", "cagrad", "gate", "off"]
CAGRAD_C, CAGRAD_STEPS = 0.5, 200
SMALL, TINY = 1e-6, 1e-12


class HeteroTune(MethodSettings, frozen=True):
    """Settings of heterotune."""

    branches: AtLeastOne = 2  # at most
    width: AtLeastOne = 8  # rows of a branch, m
    stages: AtLeastOne = 4  # bins of relative depth that share branches
    alignment: Alignment = "projection"
    across: bool = True  # U and V are shared between models
    core: Literal["trained", "frozen"] = "trained"

    def method(self) -> Method:
        """The method with these settings."""
        trained = self.core == "trained"

        def sizes(rank: int) -> dict[str, int]:
            branches = max(1, min(self.branches, rank // self.width))
            return {"branches": branches, "widths": branches * self.width}

        scope: Scope = "fleet" if self.across else "class"
        U = Factor(("widths", "rank"), trained, scope, "drawn", of="stages")
        V = U._replace(axes=("rank", "widths"), start="zero" if trained else "drawn")
        gates = Factor(("branches",), trained=True, shared="private", start="zero")
        merges: dict[str, Merge] = {"layers": unequal.mean}
        if trained:
            merges["stages"] = partial(across_classes, alignment=self.alignment)
        return Method(
            "heterotune",
            {"A": A, "B": B, "U": U, "V": V, "g": gates},
            merges,
            core=core,
            stages=self.stages,
            sizes=sizes,
            unequal="refactored",
            settings=self,
        )


def core(factors: Mapping[str, Any], _: float) -> Any:
    """C (r, r) of U (branches · width, r), V (r, branches · width), gates (branches,) or none."""
    U, V = factors["U"], factors["V"]
    if "g" in factors:
        gates = factors["g"].softmax(-1) * len(factors["g"])
        V = V * gates.repeat_interleave(len(U) // len(gates))
    return torch.eye(len(V), device=U.device) + V @ U


def across_classes(contributions: Contributions, alignment: Alignment) -> Tensors:
    """The step of each tensor from the classes' means; memory is one running mean a class."""
    running: dict[str, RunningMean] = defaultdict(RunningMean)
    for contribution in contributions():
        running[contribution.model_class].add(contribution)
    means = [(mean, mean.mean()) for _, mean in sorted(running.items())]
    steps: Tensors = {}
    for key in sorted({key for _, deltas in means for key in deltas}):
        counts = np.stack([mean.counts(key) for mean, deltas in means if key in deltas])
        deltas = np.stack([deltas[key] for _, deltas in means if key in deltas])
        steps[key] = _step(counts, deltas, alignment)
    return steps


def _step(counts: Array, deltas: Array, alignment: Alignment) -> Array:
    """One tensor's step, from the rows and the mean delta of each class that holds it."""
    plain: Array = (counts * deltas).sum(0) / np.maximum(counts.sum(0), 1)
    # a class is neither for nor against entries that it does not hold
    deltas = np.where(counts > 0, deltas, plain)
    if alignment == "off":
        return plain
    if alignment == "gate":
        return plain if _agree(deltas[:, (counts > 0).all(0)]) else np.zeros_like(plain)
    flat = deltas.reshape(len(deltas), -1)
    # of the rows behind the entry that most devices of the class hold
    shares = counts.reshape(len(counts), -1).max(1)
    return combined(flat, shares / shares.sum(), alignment).reshape(plain.shape)


def combined(steps: Array, shares: Array, alignment: Alignment) -> Array:
    """One step (entries,) of classes' steps (classes, entries), by `alignment`."""
    flat = steps.astype(np.float64)
    step = plain = shares @ flat
    norms = np.linalg.norm(flat, axis=1)
    if alignment == "cagrad":
        step = _cagrad(flat, plain)
    elif len(flat) > 1 and norms.all():
        if alignment == "projection":
            # without the parts against the common direction g
            g = (shares / norms) @ flat
            against = (flat @ g).clip(max=0)
            aligned = flat - against[:, None] * g / max(float(g @ g), TINY)
        else:
            aligned = _pairwise(flat, norms)
        step = shares @ aligned
        length = float(np.linalg.norm(step))
        opposed = length < SMALL * norms.max()  # nothing in common but rounding
        step *= 0.0 if opposed else np.linalg.norm(plain) / length
    return step.astype(np.float32)


def _pairwise(flat: Any, norms: Any) -> Any:
    """Each step without its part against any other original step, one after another."""
    # opponents are the original steps, so the order of the rows does not matter
    aligned = flat.copy()
    for row, opponent in permutations(range(len(flat)), 2):
        against = min(0.0, float(aligned[row] @ flat[opponent]))
        aligned[row] -= against / norms[opponent] ** 2 * flat[opponent]
    return aligned


def _agree(steps: Any) -> bool:
    """Whether each step (classes, entries) that is not 0 agrees with the others beyond chance."""
    norms = np.linalg.norm(steps, axis=1, keepdims=True)
    units = steps[norms[:, 0] > 0] / norms[norms[:, 0] > 0]
    remaining = units.sum(0) - units
    cosines = (units * remaining).sum(1) / np.maximum(np.linalg.norm(remaining, axis=1), TINY)
    return len(units) < 2 or bool((cosines > 2 / np.sqrt(units.shape[1])).all())


def _cagrad(flat: Any, plain: Any) -> Any:
    """plain + c ‖plain‖ g_w / ‖g_w‖, g_w = Σ w d, at the w of least g_w · plain + c ‖plain‖ ‖g_w‖."""
    gram, toward = flat @ flat.T, flat @ plain
    radius = CAGRAD_C * float(np.linalg.norm(plain))
    scale = max(float(np.abs(gram).max()), TINY)
    w = np.full(len(flat), 1 / len(flat))
    for _ in range(CAGRAD_STEPS):  # mirror descent
        slope = toward + radius * gram @ w / max(float(np.sqrt(max(w @ gram @ w, 0.0))), TINY)
        w *= np.exp(-slope / scale)
        w /= w.sum()
    g_w = w @ flat
    return plain + radius * g_w / max(float(np.linalg.norm(g_w)), TINY)


METHOD = HeteroTune().method()
