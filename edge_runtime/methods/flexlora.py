"""flexlora: the mean of the products B A over devices of unequal ranks, and its best factors in each device's rank.

    M = Σ_k p_k B_k A_k,   p_k = n_k / Σ n over the devices k that hold the layer,   M ≈ U S Vᵀ,   B <- U S,   A <- Vᵀ

The factors come in the order of their singular values, so the leading r of them are the best for a device of rank r. A's rows
are of unit length whatever M's rank is: none of them is dead for the next round.

M is never made. Its range is found by sketches, M times a few columns, which are sums over devices of small products: one
pass over the updates finds Q from random columns, two more improve it (a power iteration), and the last takes QᵀM, whose SVD
is small. So memory does not grow with the number of devices; every update is read four times. A sketch has
16 columns more than the factors have ranks: up to there M is exact, beyond it nearly.
Source: Bai et al. 2024, arXiv 2402.11505 (FlexLoRA); Halko et al. 2011, arXiv 0909.4061 (randomised SVD).
"""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias
from zlib import crc32

from edge_runtime.methods import fedit
from edge_runtime.methods.interface import Array, Contribution, Contributions, Method, Tensors, add_to

OVER = 16  # columns of a sketch beyond the factors' rank
SMALLEST = 1e-6  # singular value, of the largest; below it is rounding

# Terms of each layer's sum of products, as (layer, weight, A, B); they can be gone through more than once.
Products: TypeAlias = Callable[[], Iterable[tuple[str, int, Array, Array]]]


def mean_product(contributions: Contributions) -> Tensors:
    """The step from the factors that were to those of the mean product."""
    import numpy as np

    before: Tensors = {}
    samples: dict[str, int] = {}

    def products() -> Iterator[tuple[str, int, Array, Array]]:
        for made, layer, A, B in counted(contributions, samples):
            before.update({f"{layer}.{factor}": made.before[f"{layer}.{factor}"] for factor in "AB"})
            yield layer, made.samples, A, B

    steps: Tensors = {}
    for layer, A, B in best_factors(products, lambda layer: len(before[f"{layer}.A"])):
        old = {factor: before[f"{layer}.{factor}"] for factor in "AB"}
        steps[f"{layer}.A"], steps[f"{layer}.B"] = np.zeros_like(old["A"]), -old["B"]
        steps[f"{layer}.A"][: len(A)] = (
            A - old["A"][: len(A)]
        )  # a layer narrower than its rank has fewer directions
        steps[f"{layer}.B"][:, : len(A)] += B / samples[layer]
    return steps


def best_factors(products: Products, rank: Callable[[str], int]) -> Iterator[tuple[str, Array, Array]]:
    """Each layer with A and B, of this rank or the sum's if that is lower, whose product is the nearest to the sum of the
    terms; what a layer took is freed before the next one.

    A's rows are of unit length and at right angles, and B's columns as long as the singular values.
    """
    import numpy as np

    ranges = _bases(_sketches(products, rank))
    ranges = _bases(_times(products, _bases(_times(products, ranges, transposed=True))))
    small = _times(products, ranges, transposed=True)
    while small:
        layer, one = small.popitem()
        u, s, vt = np.linalg.svd(one.T, full_matrices=False)
        kept = min(rank(layer), max(1, int((s > SMALLEST * s[0]).sum())))
        yield layer, vt[:kept], ranges.pop(layer) @ (u[:, :kept] * s[:kept])


def counted(
    contributions: Contributions, samples: dict[str, int]
) -> Iterator[tuple[Contribution, str, Array, Array]]:
    """Each device's layers of which it sent both factors, with what it held of them after the round; the rows behind each
    layer are counted anew in samples."""
    samples.clear()
    for made in contributions():
        after = made.after()
        for key, A in after.items():
            layer, _, factor = key.rpartition(".")
            if factor == "A" and f"{layer}.B" in after:
                samples[layer] = samples.get(layer, 0) + made.samples
                yield made, layer, A, after[f"{layer}.B"]


def _sketches(products: Products, rank: Callable[[str], int]) -> Tensors:
    """Each layer's sum times random columns."""
    import numpy as np

    columns: Tensors = {}
    sketches: Tensors = {}
    for layer, weight, A, B in products():
        if layer not in columns:
            many = min(rank(layer) + OVER, A.shape[1], len(B))
            draw = np.random.default_rng(crc32(layer.encode()))
            columns[layer] = draw.standard_normal((A.shape[1], many), dtype=np.float32)
        add_to(sketches, layer, B @ (weight * (A @ columns[layer])))
    return sketches


def _times(products: Products, columns: Tensors, *, transposed: bool = False) -> Tensors:
    """Each layer's sum, or its transpose, times these columns."""
    sums: Tensors = {}
    for layer, weight, A, B in products():
        first, second = (B.T, A.T) if transposed else (A, B)
        add_to(sums, layer, second @ (weight * (first @ columns[layer])))
    return sums


def _bases(sketches: Tensors) -> Tensors:
    """Orthonormal columns that span each sketch."""
    import numpy as np

    return {layer: np.linalg.qr(sketch)[0] for layer, sketch in sketches.items()}


METHOD = Method("flexlora", fedit.METHOD.factors, {"layers": mean_product}, unequal=True, refactored=True)
