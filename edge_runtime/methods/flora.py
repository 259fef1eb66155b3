"""flora: earlier rounds are summed in a frozen adapter, beside which each round trains anew.

    y = W x + scale · (B' A' + B A) x
    A' (kept x in), B' (out x kept) are frozen;  A, B start each round from version 0
    B' A' <- B' A' + Σ_k p_k B_k A_k,   p_k = n_k / Σ n over the devices k that hold the layer

Products are added and factors never averaged, so there is no bias and devices of unequal ranks fit.
The paper stacks all devices' factors and merges their product into W after each round: the stack
grows with the number of devices, and packed weights would have to be expanded and packed again.
Here the sum has factors of rank `kept`, computed as in flexlora: exact while the sum's rank is no
higher, and the nearest product of that rank afterwards. That is ours.
Source: Wang et al. 2024, arXiv 2409.05976 (FLoRA).
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from edge_runtime.methods.flexlora import Term, best_factors, device_terms
from edge_runtime.methods.interface import (
    A,
    Array,
    AtLeastOne,
    B,
    Contributions,
    Factor,
    Method,
    MethodSettings,
    Product,
    Tensors,
)
from edge_runtime.methods.lazy import np, torch
from edge_runtime.protocol.keys import join

KEPT_A = Factor(("kept", "in"), trained=False, shared="class", start="zero")
KEPT_B = KEPT_A._replace(axes=("out", "kept"))
TINY = 1e-12


class FLoRA(MethodSettings, frozen=True):
    """Settings of flora."""

    kept: AtLeastOne = 64  # rank of A' and B'

    def method(self) -> Method:
        """The method with these settings."""
        return Method(
            "flora",
            {"A": A, "B": B, "keptA": KEPT_A, "keptB": KEPT_B},
            {"layers": partial(stacked, rank=self.kept)},
            product=joined,
            sizes=lambda rank: {"kept": self.kept},
            unequal=True,
            refactored=True,
            settings=self,
        )


def stacked(contributions: Contributions, rank: int) -> Tensors:
    """The step from A' B' of this rank to their product plus the round's mean product.

    A and B have no step: the version never holds them, so every round starts them from version 0.
    """
    old: dict[str, tuple[Array, Array]] = {}
    samples: dict[str, int] = {}

    def terms() -> Iterator[Term]:
        for contribution, term in device_terms(contributions, samples):
            if term.layer not in old:
                zeros = (
                    np.zeros((rank, term.A.shape[1]), np.float32),
                    np.zeros((len(term.B), rank), np.float32),
                )
                before = contribution.before
                keys = join(term.layer, "keptA"), join(term.layer, "keptB")
                old[term.layer] = before.get(keys[0], zeros[0]), before.get(keys[1], zeros[1])
            yield term
        # the earlier sum counts whole, since the result is divided by the layer's rows
        for layer, rows in samples.items():
            yield Term(layer, rows, *old[layer])

    steps: Tensors = {}
    for layer, new_A, new_B in best_factors(terms, lambda _: rank):
        step_A, step_B = (-factor for factor in old.pop(layer))
        mean_B = new_B / samples[layer]
        # each side takes the root of the singular values, so that 8 bits lose as little as possible
        half = np.sqrt(np.linalg.norm(mean_B, axis=0)).clip(min=TINY)
        step_A[: len(new_A)] += half[:, None] * new_A
        step_B[:, : len(new_A)] += mean_B / half
        steps |= {join(layer, "keptA"): step_A, join(layer, "keptB"): step_B}
    return steps


def joined(factors: Mapping[str, Any], depth: float) -> Product:
    """A' above A (kept + r x in), no core, and B' beside B (out x kept + r), as torch tensors."""
    return (
        torch.cat([factors["keptA"], factors["A"]]),
        None,
        torch.cat([factors["keptB"], factors["B"]], 1),
    )


METHOD = FLoRA().method()
