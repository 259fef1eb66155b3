"""hetlora: devices of unequal ranks; the mean of what they hold, filled up with zeros, weighted by the norm of the product.

    A <- Σ_k w_k [A_k; 0],   B <- Σ_k w_k [B_k 0],   w_k = ‖B_k A_k‖ / Σ ‖B A‖ over the devices k that hold the layer

A device of rank r starts from the first r rows of A and columns of B. What it does not hold shrinks by its share, as the
paper has it; ‖B_k A_k‖² is taken over all layers of a device, from its Gram matrices and never from the product.
A device's rank is what its memory allows; the paper's pruning of ranks while training is not built.
Source: Cho et al. 2024, arXiv 2401.06432 (HetLoRA).
"""

import numpy as np

from edge_runtime.methods.interface import Contribution, Factor, Method, Tensors, leading


class NormWeightedMean:
    """Running sums in the class's full rank; two arrays a tensor at most, whatever the number of devices."""

    def __init__(self) -> None:
        self._sums: Tensors = {}
        self._weights: dict[str, float] = {}

    def add(self, made: Contribution) -> None:
        """Take in what one device made, weighted by the norm of its product."""
        weight = _norm(made)
        for key, delta in made.delta.items():
            before, held = made.before[key], leading(delta.shape)
            if key not in self._sums:
                self._sums[key], self._weights[key] = np.zeros_like(before), 0.0
            step = -before  # what the device does not hold counts as zero
            step[held] = delta
            self._sums[key] += np.float32(weight) * step
            self._weights[key] += weight

    def merged(self) -> Tensors:
        """The mean of every tensor over the devices that sent it, less what it was before."""
        return {key: value / np.float32(self._weights[key]) for key, value in self._sums.items() if self._weights[key]}


def _norm(made: Contribution) -> float:
    """‖B A‖ of a device's adapter after the round, in float64."""
    squared = 0.0
    for key in made.delta:
        if key.endswith(".A") and key[:-1] + "B" in made.delta:
            A, B = (_after(made, key[:-1] + factor) for factor in "AB")
            squared += float(np.sum((A @ A.T) * (B.T @ B)))
    return float(np.sqrt(max(squared, 0.0)))


def _after(made: Contribution, key: str) -> np.ndarray:
    delta = made.delta[key]
    return (made.before[key][leading(delta.shape)] + delta).astype(np.float64)


METHOD = Method(
    "hetlora",
    {
        "A": Factor(trained=True, shared="class", start="drawn"),
        "B": Factor(trained=True, shared="class", start="zero"),
    },
    NormWeightedMean,
    unequal=True,
)
