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

from functools import partial

from edge_runtime.methods.flexlora import best_factors
from edge_runtime.methods.interface import (
    A,
    AtLeastOne,
    B,
    Contributions,
    Factor,
    Method,
    MethodSettings,
    Tensors,
)
from edge_runtime.methods.lazy import np
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
            {"layers": partial(stacked, kept=self.kept)},
            kept=self.kept,
            step="refactored",
            unequal="refactored",
            settings=self,
        )


def stacked(contributions: Contributions, kept: int) -> Tensors:
    """The step from A' B' of this rank to their product plus the round's mean product.

    A and B have no step: the version never holds them, so every round starts them from version 0.
    """
    steps: Tensors = {}
    for layer, old, new in best_factors(contributions, kept):
        step_A, step_B = -old.A, -old.B
        # each side takes the root of the singular values, so that rounding loses as little as possible
        half = np.sqrt(np.linalg.norm(new.B, axis=0)).clip(min=TINY)
        step_A[: len(new.A)] += half[:, None] * new.A
        step_B[:, : len(new.A)] += new.B / half
        steps |= {join(layer, "keptA"): step_A, join(layer, "keptB"): step_B}
    return steps


METHOD = FLoRA().method()
