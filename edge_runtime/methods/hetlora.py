"""hetlora: devices of unequal ranks; the mean of what they hold, filled up with zeros, weighted by the norm of the product.

    A <- Σ_k w_k [A_k; 0],   B <- Σ_k w_k [B_k 0],   w_k = ‖B_k A_k‖ / Σ ‖B A‖ over the devices k that hold the layer

A device of rank r starts from the first r rows of A and columns of B. What it does not hold shrinks by its share, as the
paper has it; what no device of the round holds stays, or it would be zero in A and B and never learn again. ‖B_k A_k‖² is taken
over all layers of a device, from its Gram matrices and never from the product. A device's rank is what its memory allows; the
paper's pruning of ranks while training is not built.
Source: Cho et al. 2024, arXiv 2401.06432 (HetLoRA).
"""

from edge_runtime.methods import fedit
from edge_runtime.methods.interface import Contributions, Method, Tensors, leading


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


METHOD = Method("hetlora", fedit.METHOD.factors, {"layers": norm_weighted_mean}, unequal=True)
