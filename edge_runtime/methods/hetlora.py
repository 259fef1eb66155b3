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

from collections.abc import Callable, Mapping
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
)
from edge_runtime.methods.lazy import np
from edge_runtime.protocol.keys import join, leading, parse


class HetLoRA(MethodSettings, frozen=True):
    """Settings of hetlora."""

    penalty: NotNegative = 0.0  # weight of the loss on ranks beyond `keep`; 0: ranks do not fall
    keep: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.75  # leading share of a device's rank

    def method(self) -> Method:
        """The method with these settings."""
        plain = Method(
            "hetlora",
            fedit.METHOD.factors,
            {"layers": norm_weighted_mean},
            unequal=True,
            settings=self,
        )
        if not self.penalty:
            return plain
        return plain._replace(
            passes=lambda _: (Pass(penalty=self._penalty),),
            ranks=lambda adapter: tuple(range(adapter.rank, 0, -1)),
            next_rank=self._next_rank,
        )

    def _leading(self, rank: int) -> int:
        return max(1, int(self.keep * rank))

    def _penalty(self, products: list[Product], _: list[Any]) -> Any:
        tails = (
            B[:, self._leading(len(A)) :].norm() * A[self._leading(len(A)) :].norm() for A, _, B in products
        )
        return self.penalty * sum(tails) / len(products)

    def _next_rank(self, after: Mapping[str, Any], before: Callable[[str], Any]) -> int:
        """The leading ranks where the tail shrank in the round, else all of the device's."""
        layers = [parse(key).place for key in after if parse(key).factor == "A"]
        rank = len(after[join(layers[0], "A")])
        fewer = self._leading(rank)
        return fewer if _tails(layers, after.__getitem__, fewer) < _tails(layers, before, fewer) else rank


def norm_weighted_mean(contributions: Contributions) -> Tensors:
    """The step to the weighted mean; keeps one sum of full rank a tensor."""
    before: Tensors = {}
    sums: Tensors = {}
    weights: dict[str, float] = {}
    largest: dict[str, tuple[int, ...]] = {}  # the shape in the highest rank of any device
    for contribution in contributions():
        after = contribution.after()
        weight = _norm(after)
        for key, value in after.items():
            if key not in sums:
                before[key], weights[key] = contribution.before[key], 0.0
                sums[key] = 0 * contribution.before[key]
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


def _norm(state: Tensors) -> float:
    """‖B A‖ of an adapter: ‖B A‖² is the sum of A Aᵀ times Bᵀ B, entry by entry."""
    squared = 0.0
    for key, A in state.items():
        B = state.get(join(parse(key).place, "B"))
        if parse(key).factor == "A" and B is not None:
            squared += float(((A @ A.T) * (B.T @ B)).sum(dtype="float64"))
    return max(squared, 0.0) ** 0.5


def _tails(layers: list[str], state: Callable[[str], Any], rank: int) -> float:
    """Σ over layers of ‖B[:, rank:]‖ ‖A[rank:]‖."""
    tails = ((state(join(layer, "B"))[:, rank:], state(join(layer, "A"))[rank:]) for layer in layers)
    return sum(float(np.linalg.norm(B) * np.linalg.norm(A)) for B, A in tails)


METHOD = HetLoRA().method()
