"""flexlora: the mean of the products B A, and its best factors in each device's rank.

    M = Σ_k p_k B_k A_k,   p_k = n_k / Σ n over the devices k that hold the layer
    M ≈ U S Vᵀ,   B <- U S,   A <- Vᵀ

The factors are ordered by singular value, so the leading r of them are the best for a device of
rank r. Each row of A has unit length, whatever M's rank: no row is dead in the next round.

M (out x in) is never computed. Sketches, M times a few columns, are sums over devices of small
products. One pass over the updates finds an orthonormal Q from random columns, two passes improve Q
(a power iteration), and the last pass computes QᵀM, whose SVD is small. Memory does not grow with
the number of devices; every update is read four times. A sketch has 16 columns more than the
factors have ranks: M is exact up to that rank, and nearly exact beyond.
Source: Bai et al. 2024, arXiv 2402.11505 (FlexLoRA); Halko et al. 2011, arXiv 0909.4061 (randomised
SVD).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple, TypeAlias
from zlib import crc32

from edge_runtime.methods import fedit
from edge_runtime.methods.interface import Array, Contributions, Method, Tensors, add_to, layer_factors
from edge_runtime.methods.lazy import np
from edge_runtime.protocol.keys import join

OVER = 16  # columns of a sketch beyond the factors' rank
SMALLEST = 1e-6  # singular value, as a share of the largest; a smaller one is rounding


class Factors(NamedTuple):
    """A and B of a layer."""

    A: Array
    B: Array


# Terms of the layers' sums: place, weight and factors. Each call goes through all of them again.
Terms: TypeAlias = Callable[[], Iterable[tuple[str, int, Factors]]]


def mean_product(contributions: Contributions) -> Tensors:
    """The step from the last version's factors to those of the mean product."""
    steps: Tensors = {}
    for layer, old, new in best_factors(contributions):
        steps |= step(layer, old, new)
    return steps


def step(layer: str, old: Factors, new: Factors) -> Tensors:
    """The step of a layer's A and B from old factors to new ones, of the same rank or a lower one."""
    step_A, step_B = np.zeros_like(old.A), -old.B
    # a layer narrower than its rank has fewer directions than A has rows
    rank = len(new.A)
    step_A[:rank] = new.A - old.A[:rank]
    step_B[:, :rank] += new.B
    return {join(layer, "A"): step_A, join(layer, "B"): step_B}


def best_factors(contributions: Contributions, kept: int = 0) -> Iterator[tuple[str, Factors, Factors]]:
    """Each layer's place, its last factors, and factors nearest to the devices' mean product.

    The new A's rows are orthonormal, and the new B's columns are as long as the singular values.
    The new factors have the rank of the last factors, or the product's rank where that is lower.
    A layer's memory is freed before the next layer.

    Args:
        kept: rank of keptA and keptB, which are then the last factors, and whose product joins the
            mean; 0: the last factors are A and B.
    """
    old: dict[str, Factors] = {}
    samples: dict[str, int] = {}  # rows behind each layer
    columns: Tensors = {}  # random; the layer's name decides

    def terms() -> Iterator[tuple[str, int, Factors]]:
        samples.clear()
        for contribution in contributions():
            for layer, A, B in layer_factors(contribution.after()):
                if layer not in old:
                    old[layer] = _last(contribution.before, layer, Factors(A, B), kept)
                    count = min(len(old[layer].A) + OVER, A.shape[1], len(B))
                    draw = np.random.default_rng(crc32(layer.encode()))
                    columns[layer] = draw.standard_normal((A.shape[1], count), dtype=np.float32)
                samples[layer] = samples.get(layer, 0) + contribution.samples
                yield layer, contribution.samples, Factors(A, B)
        if kept:
            # the last product counts whole, since the result is divided by the layer's rows
            yield from ((layer, rows, old[layer]) for layer, rows in samples.items())

    # an orthonormal Q from random columns, improved by one power iteration
    ranges = _bases(_times(terms, columns))
    columns.clear()
    ranges = _bases(_times(terms, _bases(_times(terms, ranges, transposed=True))))
    # the small (QᵀM)ᵀ, whose SVD gives the factors
    projected = _times(terms, ranges, transposed=True)
    while projected:
        layer, product = projected.popitem()
        u, s, vt = np.linalg.svd(product.T, full_matrices=False)
        count = min(len(old[layer].A), max(1, int((s > SMALLEST * s[0]).sum())))
        B = ranges.pop(layer) @ (u[:, :count] * s[:count])
        yield layer, old.pop(layer), Factors(vt[:count], B / samples[layer])


def _last(version: Mapping[str, Array], layer: str, device: Factors, kept: int) -> Factors:
    """The last version's factors of a layer; zeros where it has none yet."""
    A, B = (join(layer, f"kept{name}" if kept else name) for name in "AB")
    if A in version:
        return Factors(version[A], version[B])
    into, out = device.A.shape[1], len(device.B)
    return Factors(np.zeros((kept, into), np.float32), np.zeros((out, kept), np.float32))


def _times(terms: Terms, columns: Tensors, *, transposed: bool = False) -> Tensors:
    """Each layer's sum, or its transpose, times these columns."""
    sums: Tensors = {}
    for layer, weight, (A, B) in terms():
        first, second = (B.T, A.T) if transposed else (A, B)
        add_to(sums, layer, second @ (weight * (first @ columns[layer])))
    return sums


def _bases(sketches: Tensors) -> Tensors:
    """Orthonormal columns that span each sketch."""
    return {layer: np.linalg.qr(sketch)[0] for layer, sketch in sketches.items()}


METHOD = Method(
    "flexlora", fedit.METHOD.factors, {"layers": mean_product}, step="refactored", unequal="refactored"
)
