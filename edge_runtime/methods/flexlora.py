"""flexlora: the mean of the products B A over devices of unequal ranks, and its best factors in each device's rank.

    M = Σ_k p_k B_k A_k,   p_k = n_k / Σ n over the devices k that hold the layer,   M ≈ U S Vᵀ,   B <- U S,   A <- Vᵀ

The factors come in the order of their singular values, so the leading r of them are the best for a device of rank r. A's rows
are of unit length whatever M's rank is: none of them is dead for the next round.

M is never made. Its range is found by sketches, M times a few columns, which are sums over devices of small products: one
pass over the updates finds Q from random columns, two more improve it (a power iteration), and the last takes QᵀM, whose SVD
is small. So memory does not grow with the number of devices; every update is read four times. A sketch has
twice as many columns as the factors have ranks: up to there M is exact, beyond it nearly.
Source: Bai et al. 2024, arXiv 2402.11505 (FlexLoRA); Halko et al. 2011, arXiv 0909.4061 (randomised SVD).
"""

from collections.abc import Iterator
from zlib import crc32

from edge_runtime.methods import fedit
from edge_runtime.methods.interface import Array, Contribution, Contributions, Method, Tensors, add_to

OVER = 2  # columns of a sketch, of the factors' rank


def mean_product(contributions: Contributions) -> Tensors:
    """The step from the factors that were to those of the mean product."""
    import numpy as np

    before: Tensors = {}
    samples: dict[str, int] = {}
    columns: Tensors = {}
    sketches: Tensors = {}
    for made in contributions():
        for layer, A, B in _layers(made):
            if layer not in samples:
                before |= {f"{layer}.{factor}": made.before[f"{layer}.{factor}"] for factor in "AB"}
                many = min(OVER * len(before[f"{layer}.A"]), A.shape[1], len(B))
                draw = np.random.default_rng(crc32(layer.encode()))
                columns[layer] = draw.standard_normal((A.shape[1], many), dtype=np.float32)
            samples[layer] = samples.get(layer, 0) + made.samples
            add_to(sketches, layer, made.samples * (B @ (A @ columns[layer])))
    ranges = _bases(sketches)
    ranges = _bases(_times(contributions, _bases(_times(contributions, ranges, transposed=True))))
    steps: Tensors = {}
    for layer, small in _times(contributions, ranges, transposed=True).items():
        old = {factor: before[f"{layer}.{factor}"] for factor in "AB"}
        u, s, vt = np.linalg.svd(small.T / samples[layer], full_matrices=False)
        rank = min(
            len(old["A"]), len(s)
        )  # a layer narrower than that has fewer directions: of A the rest stays, of B it is 0
        steps[f"{layer}.A"], steps[f"{layer}.B"] = np.zeros_like(old["A"]), -old["B"]
        steps[f"{layer}.A"][:rank] = vt[:rank] - old["A"][:rank]
        steps[f"{layer}.B"][:, :rank] += ranges[layer] @ (u[:, :rank] * s[:rank])
    return steps


def _layers(made: Contribution) -> Iterator[tuple[str, Array, Array]]:
    """Each layer of which the device sent both factors, and what it held of them after the round."""
    after = made.after()
    for key, A in after.items():
        layer, _, factor = key.rpartition(".")
        if factor == "A" and f"{layer}.B" in after:
            yield layer, A, after[f"{layer}.B"]


def _times(contributions: Contributions, columns: Tensors, *, transposed: bool = False) -> Tensors:
    """Σ n_k B_k A_k of each layer, or its transpose, times these columns."""
    sums: Tensors = {}
    for made in contributions():
        for layer, A, B in _layers(made):
            first, second = (B.T, A.T) if transposed else (A, B)
            add_to(sums, layer, made.samples * (second @ (first @ columns[layer])))
    return sums


def _bases(sketches: Tensors) -> Tensors:
    """Orthonormal columns that span each sketch."""
    import numpy as np

    return {layer: np.linalg.qr(sketch)[0] for layer, sketch in sketches.items()}


METHOD = Method("flexlora", fedit.METHOD.factors, {"layers": mean_product}, unequal=True, refactored=True)
