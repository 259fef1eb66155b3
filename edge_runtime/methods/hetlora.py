"""hetlora: devices of unequal ranks; the mean of what they hold, filled up with zeros, weighted by the norm of the product.

    A <- Σ_k w_k [A_k; 0],   B <- Σ_k w_k [B_k 0],   w_k = ‖B_k A_k‖ / Σ ‖B A‖ over the devices k that hold the layer

A device of rank r starts from the first r rows of A and columns of B. What it does not hold shrinks by its share, as the
paper has it; what no device of the round holds stays, or it would be zero in A and B and never learn again. ‖B_k A_k‖² is taken
over all layers of a device, from its Gram matrices and never from the product.

A device's rank is what its memory allows. With `penalty` above 0 it also falls while it trains: the loss has

    penalty · mean over layers of ‖B[:, kept:]‖ ‖A[kept:]‖,   kept = ⌊keep · r⌋

and where the sum of these has fallen in a round, the device goes on with the first `kept` of its ranks. What is beyond is not
sent then.
Source: Cho et al. 2024, arXiv 2401.06432 (HetLoRA).
"""

from collections.abc import Callable, Mapping
from typing import Annotated, Any

import msgspec

from edge_runtime.methods import fedit
from edge_runtime.methods.interface import Contributions, Method, NotNegative, Pass, Tensors
from edge_runtime.protocol.keys import leading


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """penalty: of what lies beyond the leading share `keep` of a device's rank; 0: ranks do not fall."""

    penalty: NotNegative = 0.0
    keep: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.75


def norm_weighted_mean(contributions: Contributions) -> Tensors:
    """The mean of every tensor over the devices that sent it, less what it was before; one sum a tensor in full rank."""
    before: Tensors = {}
    sums: Tensors = {}
    weights: dict[str, float] = {}
    held: dict[str, tuple[int, ...]] = {}  # the shape of the highest rank
    for made in contributions():
        after = made.after()
        weight = _norm(after)
        for key, value in after.items():
            if key not in sums:
                before[key], weights[key] = made.before[key], 0.0
                sums[key] = 0 * made.before[key]
            value *= weight
            sums[key][leading(value.shape)] += value
            weights[key] += weight
            held[key] = max(held.get(key, value.shape), value.shape)
    steps: Tensors = {}
    for key, total in sums.items():
        if weights[key]:
            where = leading(held[key])
            steps[key] = 0 * total
            steps[key][where] = total[where] / weights[key] - before[key][where]
    return steps


def _norm(state: Tensors) -> float:
    """‖B A‖ of an adapter: ‖B A‖² is the sum of A Aᵀ by Bᵀ B, entry by entry."""
    squared = 0.0
    for key, A in state.items():
        B = state.get(key[:-1] + "B")
        if key.endswith(".A") and B is not None:
            squared += float(((A @ A.T) * (B.T @ B)).sum(dtype="float64"))
    return max(squared, 0.0) ** 0.5


def method(settings: Settings) -> Method:
    """The method with these settings."""

    def kept(rank: int) -> int:
        return max(1, int(settings.keep * rank))

    def penalty(now: list[tuple[Any, Any, Any]], _: list[Any]) -> Any:
        tails = (B[:, kept(len(A)) :].norm() * A[kept(len(A)) :].norm() for A, _, B in now)
        return settings.penalty * sum(tails) / len(now)

    def pruned(now: Mapping[str, Any], before: Callable[[str], Any]) -> int:
        layers = [key[:-2] for key in now if key.endswith(".A")]
        rank = len(now[f"{layers[0]}.A"])
        fell = _tails(layers, now.__getitem__, kept(rank)) < _tails(layers, before, kept(rank))
        return kept(rank) if fell else rank

    plain = Method("hetlora", fedit.METHOD.factors, {"layers": norm_weighted_mean}, unequal=True)
    return (
        plain
        if not settings.penalty
        else plain._replace(passes=lambda _: (Pass(penalty=penalty),), pruned=pruned)
    )


def _tails(layers: list[str], state: Callable[[str], Any], kept: int) -> float:
    """Σ over layers of ‖B[:, kept:]‖ ‖A[kept:]‖."""
    import numpy as np

    tails = ((state(f"{layer}.B")[:, kept:], state(f"{layer}.A")[kept:]) for layer in layers)
    return sum(float(np.linalg.norm(B) * np.linalg.norm(A)) for B, A in tails)


METHOD = method(Settings())
