"""hetlora: the mean of factors of unequal ranks, weighted by the norm of each product.

    A <- Σ_k w_k [A_k; 0],   B <- Σ_k w_k [B_k 0]
    w_k = ‖B_k A_k‖ / Σ ‖B A‖ over the devices k that hold the layer

A device of rank r starts from the first r rows of A and columns of B. Entries that a device does
not hold shrink by its share, as in the paper. Entries that no device of the round holds stay:
shrinking to zero in A and in B, they would never learn again. ‖B_k A_k‖² is the sum over all layers
of a device, from Gram matrices and never from the product.

A device's rank is as high as its memory allows. With `penalty` above 0 the rank also falls during
training. The loss gets

    penalty · mean over layers of ‖B[:, m:]‖ ‖A[m:]‖,   m = ⌊keep · r⌋

and a device in which the sum of these fell during a round sends, and goes on with, its first m
ranks.
Source: Cho et al. 2024, arXiv 2401.06432 (HetLoRA).
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any

import msgspec

from edge_runtime.methods import fedit
from edge_runtime.methods.interface import (
    Contributions,
    Method,
    MethodSettings,
    NotNegative,
    Pass,
    Product,
    Tensors,
    layer_factors,
)
from edge_runtime.methods.lazy import np
from edge_runtime.protocol.keys import join, leading


class HetLoRA(MethodSettings, frozen=True):
    """Settings of hetlora."""

    penalty: NotNegative = 0.0  # weight of the loss on ranks beyond `keep`; 0: ranks do not fall
    keep: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.75  # leading share of a device's rank

    def method(self) -> Method:
        """The method with these settings."""
        falls = self.penalty > 0
        return Method(
            "hetlora",
            fedit.METHOD.factors,
            {"layers": norm_weighted_mean},
            step="shrinking" if falls else "mean",
            unequal="shrinking",
            passes=lambda _: (Pass(penalty=self._penalty if falls else None),),
            next_rank=self._next_rank if falls else None,
            settings=self,
        )

    def _leading(self, rank: int) -> int:
        return max(1, int(self.keep * rank))

    def _penalty(self, products: Iterable[Product], cores: list[Any]) -> Any:
        tails = (
            B[:, self._leading(len(A)) :].norm() * A[self._leading(len(A)) :].norm() for A, _, B in products
        )
        return self.penalty * sum(tails) / len(cores)

    def _next_rank(self, after: Mapping[str, Any], before: Callable[[str], Any]) -> int:
        """The number of leading ranks if the tail shrank in the round, else the device's rank."""
        layers = [layer for layer, _, _ in layer_factors(after)]
        rank = len(after[join(layers[0], "A")])
        fewer = self._leading(rank)

        def tails(factor: Callable[[str], Any]) -> float:
            pairs = ((factor(join(layer, "A")), factor(join(layer, "B"))) for layer in layers)
            return sum(float(np.linalg.norm(B[:, fewer:]) * np.linalg.norm(A[fewer:])) for A, B in pairs)

        return fewer if tails(after.__getitem__) < tails(before) else rank


def norm_weighted_mean(contributions: Contributions) -> Tensors:
    """The step to the weighted mean; keeps one sum of full rank a tensor."""
    before: Tensors = {}
    sums: Tensors = {}
    weights: dict[str, float] = defaultdict(float)
    largest: dict[str, tuple[int, ...]] = {}  # the shape in the highest rank of any device
    for contribution in contributions():
        after = contribution.after()
        # ‖B A‖² is the sum of A Aᵀ times Bᵀ B, entry by entry
        squares = (((A @ A.T) * (B.T @ B)).sum(dtype="float64") for _, A, B in layer_factors(after))
        weight = max(float(sum(squares)), 0.0) ** 0.5
        for key, value in after.items():
            if key not in sums:
                before[key] = contribution.before[key]
                sums[key] = 0 * before[key]
            value *= weight
            sums[key][leading(value.shape)] += value
            weights[key] += weight
            largest[key] = max(largest.get(key, value.shape), value.shape)
    steps: Tensors = {}
    for key, total in sums.items():
        # a weight of 0: every device sent a product of 0, so the version stays
        if weights[key]:
            entries = leading(largest[key])
            steps[key] = 0 * total
            steps[key][entries] = total[entries] / weights[key] - before[key][entries]
    return steps


METHOD = HetLoRA().method()
