"""flora: what the rounds have learned is a frozen adapter of higher rank, on which each round trains a fresh one.

    y = W x + scale · (B' A' + B A) x        A' (kept x in), B' (out x kept) frozen;  A, B as in version 0 when a round begins
    B' A' <- B' A' + Σ_k p_k B_k A_k,   p_k = n_k / Σ n over the devices k that hold the layer

Products are added up and factors never averaged, so there is no bias and devices of unequal ranks fit. The paper stacks all
devices' factors and merges their product into W after each round: the stack grows with the number of devices, and W would
have to be expanded and packed anew. Here the sum is kept in factors of rank `kept`, found as in flexlora: exactly while its
rank is no higher, and as the nearest product of that rank afterwards. That is ours.
Source: Wang et al. 2024, arXiv 2409.05976 (FLoRA).
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import msgspec

from edge_runtime.methods.flexlora import best_factors, counted
from edge_runtime.methods.interface import A, Array, AtLeastOne, B, Contributions, Factor, Method, Tensors

TINY = 1e-12


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """kept: the rank of what earlier rounds have learned."""

    kept: AtLeastOne = 64


def stacked(contributions: Contributions, rank: int) -> Tensors:
    """The step from the kept factors, of this rank, to those of their product plus the mean product of the round."""
    import numpy as np

    old: dict[str, tuple[Array, Array]] = {}
    samples: dict[str, int] = {}

    def products() -> Iterator[tuple[str, int, Array, Array]]:
        for made, layer, own_A, own_B in counted(contributions, samples):
            if layer not in old:
                nothing = (
                    np.zeros((rank, own_A.shape[1]), np.float32),
                    np.zeros((len(own_B), rank), np.float32),
                )
                keys = f"{layer}.keptA", f"{layer}.keptB"
                old[layer] = (made.before.get(keys[0], nothing[0]), made.before.get(keys[1], nothing[1]))
            yield layer, made.samples, own_A, own_B
        for layer, count in samples.items():
            yield layer, count, *old[layer]

    steps: Tensors = {}
    for layer, new_A, new_B in best_factors(products, lambda _: rank):
        step_A, step_B = (-one for one in old.pop(layer))
        mean_B = new_B / samples[layer]
        # half of each singular value goes to either side, so that 8 bits take as little as they can
        half = np.sqrt(np.linalg.norm(mean_B, axis=0)).clip(min=TINY)
        step_A[: len(new_A)] += half[:, None] * new_A
        step_B[:, : len(new_A)] += mean_B / half
        steps |= {f"{layer}.keptA": step_A, f"{layer}.keptB": step_B}
    return steps


def low_rank(factors: Mapping[str, Any]) -> tuple[Any, Any]:
    """The kept A (kept x in) above A (r x in), and the kept B (out x kept) beside B (out x r), which are torch's."""
    import torch

    return torch.cat([factors["keptA"], factors["A"]]), torch.cat([factors["keptB"], factors["B"]], 1)


def method(settings: Settings) -> Method:
    """The method with these settings."""
    kept = Factor(("kept", "in"), trained=False, shared="class", start="zero")
    factors = {
        "A": A._replace(anew=True),
        "B": B._replace(anew=True),
        "keptA": kept,
        "keptB": kept._replace(axes=("out", "kept")),
    }
    return Method(
        "flora",
        factors,
        {"layers": partial(stacked, rank=settings.kept)},
        low_rank=low_rank,
        sizes=lambda rank: {"kept": settings.kept},
        unequal=True,
        refactored=True,
    )


METHOD = method(Settings())
