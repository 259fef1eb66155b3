"""heterotune: a dense mixture of branches between A and B that all models share, merged along directions that do not conflict.

    y = W x + scale · B C A x        C = I + Σ_j g_j V_j U_j,  g = J · softmax of the layer's own J gates
    A, B     as in fedit: their mean inside a model class
    U, V     (m x r), (r x m) of branch j, one pair for all layers at about the same relative depth, across the fleet
    gates    of each layer, private

All branches run: no router, no tokens dropped. A device holds as many branches as its rank has room for, the first ones; each
entry is averaged over the devices that hold it. U is drawn, V and the gates are 0 at the start, so that C is the identity and
a branch counts the same on devices that hold few and on those that hold many.

Across classes (CMGA), for each of U and V: d_c is the mean of class c's devices, p_c its share of the rows (of those behind the
entry that most of its devices hold), and

    g = Σ_c p_c d_c / ‖d_c‖,   d_c' = d_c - min(0, <d_c, g>) / ‖g‖² · g,   step = Σ_c p_c d_c' · ‖Σ_c p_c d_c‖ / ‖Σ_c p_c d_c'‖

It acts where <d_c, g> < 0, with two classes where their cosine is below -p_1 / p_2: of two with equal shares neither ever is
against g, and this is the plain mean. `alignment` chooses: "projection" is this; "pairwise" takes from each d_c what opposes
any other class's (FedGH); "cagrad" is the step of conflict-averse gradients, which takes a class that is alone 1 + CAGRAD_C
times as far as its own; "gate" is the plain mean of a tensor of n values where the cosine of each d_c with the others' common
direction is above 2 / √n, twice what chance gives, over the entries that all of them hold, and no step at all elsewhere; "off"
the plain mean.
`across = false` keeps U and V in the class: the control in which nothing crosses. `core = "frozen"` draws U and V and trains
neither: the other one.

What is known of HeteroTune (arXiv 2411.16796) is its abstract: a dense mixture of adapters (DeMA) and an aggregation that
harmonises gradient directions across models (CMGA). The equations here are ours.
Sources of the variants: FedGH, arXiv 2309.06692; Yu et al. 2020, arXiv 2001.06782; Liu et al. 2021, arXiv 2110.14048.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from edge_runtime.methods.fedit import RunningMean, holders_mean
from edge_runtime.methods.interface import (
    A,
    Array,
    AtLeastOne,
    B,
    Contributions,
    Factor,
    Method,
    Scope,
    Tensors,
)

CAGRAD_C, CAGRAD_STEPS = 0.5, 200
SMALL, TINY = 1e-6, 1e-12


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """branches: at most, of width rows each. stages: bins of relative depth that share branches."""

    branches: AtLeastOne = 2
    width: AtLeastOne = 8
    stages: AtLeastOne = 4
    alignment: Literal["projection", "pairwise", "cagrad", "gate", "off"] = "projection"
    across: bool = True
    core: Literal["trained", "frozen"] = "trained"


def core(factors: Mapping[str, Any], _: float) -> Any:
    """C (r, r) of a layer's gates (branches,), U (branches · width, r) and V (r, branches · width), which are torch's."""
    import torch

    U, V, gates = factors["U"], factors["V"], factors["g"].softmax(-1) * len(factors["g"])
    weights = gates.repeat_interleave(len(U) // len(gates))
    return torch.eye(len(V), device=U.device) + (V * weights) @ U


def method(settings: Settings) -> Method:
    """The method with these settings."""
    trained = settings.core == "trained"
    scope: Scope = "fleet" if settings.across else "class"
    U = Factor(("widths", "rank"), trained, scope, "drawn", of="stages")
    V = U._replace(axes=("rank", "widths"), start="zero" if trained else "drawn")
    g = Factor(("branches",), True, "private", "zero")

    def sizes(rank: int) -> dict[str, int]:
        branches = max(1, min(settings.branches, rank // settings.width))
        return {"stages": settings.stages, "branches": branches, "widths": branches * settings.width}

    def aligned(contributions: Contributions) -> Tensors:
        return across_classes(contributions, settings.alignment)

    return Method(
        "heterotune",
        {"A": A, "B": B, "U": U, "V": V, "g": g},
        {"layers": holders_mean, **({"stages": aligned} if trained else {})},
        core=core,
        sizes=sizes,
        unequal=True,
    )


def across_classes(contributions: Contributions, alignment: str) -> Tensors:
    """The step of each tensor from the means of the classes; one running mean a class, whatever the number of devices."""
    import numpy as np

    running: dict[str, RunningMean] = defaultdict(RunningMean)
    for made in contributions():
        running[made.model_class].add(made)
    means = [(one, one.mean()) for _, one in sorted(running.items())]
    found: Tensors = {}
    for key in sorted({key for _, mean in means for key in mean}):
        counts = np.stack([one.counts(key) for one, mean in means if key in mean])
        steps = np.stack([mean[key] for _, mean in means if key in mean])
        holders = (counts * steps).sum(0) / np.maximum(counts.sum(0), 1)
        steps = np.where(
            counts > 0, steps, holders
        )  # a class is neither for nor against what it does not hold
        if alignment in ("off", "gate"):
            closed = alignment == "gate" and not _agree(steps[:, (counts > 0).all(0)])
            found[key] = np.zeros_like(holders) if closed else holders
        else:
            shares = counts.reshape(len(counts), -1).max(1)
            found[key] = combined(list(steps), list(shares / shares.sum()), alignment)
    return found


def combined(steps: list[Array], shares: list[float], alignment: str) -> Array:
    """One step of several, with the conflicts between them taken out as the alignment has it."""
    import numpy as np

    flat = np.stack([step.ravel() for step in steps]).astype(np.float64)
    p = np.array(shares)
    plain = p @ flat
    norms = np.linalg.norm(flat, axis=1)
    if alignment == "cagrad":
        made = _cagrad(flat, plain)
    elif len(flat) == 1 or not norms.all():
        made = plain
    else:
        mended = _projected(flat, (p / norms) @ flat) if alignment == "projection" else _pairwise(flat, norms)
        made = p @ mended
        length = float(np.linalg.norm(made))
        opposed = length < SMALL * norms.max()  # nothing in common is left but rounding
        made *= 0.0 if opposed else np.linalg.norm(plain) / length
    result: Array = made.reshape(steps[0].shape).astype(np.float32)
    return result


def _projected(flat: Any, g: Any) -> Any:
    """Without what opposes the common direction g."""
    against = (flat @ g).clip(max=0)
    return flat - against[:, None] * g / max(float(g @ g), TINY)


def _pairwise(flat: Any, norms: Any) -> Any:
    """Each without what opposes any of the others, one after another, as these were at first."""
    mended = flat.copy()
    for own in range(len(flat)):
        for other in range(len(flat)):
            if own != other:
                against = min(0.0, float(mended[own] @ flat[other]))
                mended[own] -= against / norms[other] ** 2 * flat[other]
    return mended


def _agree(steps: Any) -> bool:
    """Whether each class's step (classes, entries) points where the others do, more than by chance; one that does not move has
    no say."""
    import numpy as np

    norms = np.linalg.norm(steps, axis=1, keepdims=True)
    units = steps[norms[:, 0] > 0] / norms[norms[:, 0] > 0]
    others = units.sum(0) - units
    cosines = (units * others).sum(1) / np.maximum(np.linalg.norm(others, axis=1), TINY)
    return len(units) < 2 or bool((cosines > 2 / np.sqrt(units.shape[1])).all())


def _cagrad(flat: Any, plain: Any) -> Any:
    """plain + c ‖plain‖ g_w / ‖g_w‖, with g_w = Σ w d of the w on the simplex that makes g_w · plain + c ‖plain‖ ‖g_w‖ least."""
    import numpy as np

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


METHOD = method(Settings())
