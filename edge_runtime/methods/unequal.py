"""A and B of devices of unequal ranks: the mean of their products' steps, in place of their entries.

    M = B A + Σ_k p_k (B_k A_k - B[:, :r_k] A[:r_k]),   p_k = n_k / Σ n over the holders of the layer
    M ≈ U S Vᵀ in the version's rank,   B <- U S R,   A <- Rᵀ Vᵀ

A and B are the version's, of which device k of rank r_k held the leading r_k. A layer whose holders
in a round have one rank gets the mean of entries, as in fedit.

In the mean of entries, a device of rank r gets whichever share of a product the devices of higher
ranks have put into the first r directions. Here the leading r are the best of M in that rank, for
each rank r of the round's devices. What a device does not hold stays; with one device M has that
device's step, and nothing else.

R is orthogonal, with a block for the directions between one rank and the next, so that it changes
no leading product. It turns each block of A as near as possible to the last A. A core C between A
and B is not part of M: C stays as it is, between axes that have turned little. In the round in
which B leaves 0 they turn far, but there C is still near its start.
Source: the best factors are those of flexlora; the mean of steps and R are ours.
"""

from collections import defaultdict
from collections.abc import Iterable
from itertools import pairwise

from edge_runtime.methods.fedit import RunningMean
from edge_runtime.methods.flexlora import Factors, best_factors, step
from edge_runtime.methods.interface import Contribution, Contributions, Tensors, layer_factors
from edge_runtime.methods.lazy import np
from edge_runtime.protocol.keys import leading, parse


def mean(contributions: Contributions) -> Tensors:
    """The step of each tensor: of entries where the layer's devices have one rank, of products elsewhere.

    Memory is that of fedit, and of flexlora for the layers of unequal ranks.
    """
    running = RunningMean()
    ranks: dict[str, set[int]] = defaultdict(set)
    for contribution in contributions():
        running.add(contribution)
        for layer, A, _ in layer_factors(contribution.delta):
            ranks[layer].add(len(A))
    steps = running.mean()
    mixed = {layer: held for layer, held in ranks.items() if len(held) > 1}
    if mixed:
        for layer, old, new in best_factors(lambda: (_padded(each, mixed) for each in contributions())):
            steps |= step(layer, old, _turned(new, old, mixed[layer]))
    return steps


def _padded(contribution: Contribution, layers: Iterable[str]) -> Contribution:
    """The device's factors of these layers in the version's rank, as if it had trained all of it."""
    delta = {}
    for key, value in contribution.delta.items():
        if parse(key).place in layers:
            delta[key] = np.zeros_like(contribution.before[key])
            delta[key][leading(value.shape)] = value
    return contribution._replace(delta=delta)


def _turned(new: Factors, old: Factors, ranks: Iterable[int]) -> Factors:
    """The new factors, turned towards the old between one rank and the next."""
    A, B = new.A.copy(), new.B.copy()
    for first, end in pairwise(sorted({0, *ranks, len(old.A)})):
        part = slice(first, min(end, len(A)))
        # orthogonal Procrustes: the R of least ‖Rᵀ new - old‖
        u, _, vt = np.linalg.svd(A[part] @ old.A[part].T)
        A[part], B[:, part] = (u @ vt).T @ A[part], B[:, part] @ (u @ vt)
    return Factors(A, B)
