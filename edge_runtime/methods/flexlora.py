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

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeAlias
from zlib import crc32

from edge_runtime.methods import fedit
from edge_runtime.methods.interface import Array, Contribution, Contributions, Method, Tensors, add_to
from edge_runtime.methods.lazy import np
from edge_runtime.protocol.keys import join, parse

OVER = 16  # columns of a sketch beyond the factors' rank
SMALLEST = 1e-6  # singular value, as a share of the largest; a smaller one is rounding


class Term(NamedTuple):
    """One term of a layer's sum of products: weight · B · A."""

    layer: str  # the place of its keys
    weight: int
    A: Array
    B: Array


Terms: TypeAlias = Callable[[], Iterable[Term]]  # of all layers; each call goes through them again


def mean_product(contributions: Contributions) -> Tensors:
    """The step from the last version's factors to those of the mean product."""
    before: Tensors = {}
    samples: dict[str, int] = {}

    def terms() -> Iterator[Term]:
        for contribution, term in device_terms(contributions, samples):
            before.update({key: contribution.before[key] for key in _pair(term.layer)})
            yield term

    steps: Tensors = {}
    for layer, A, B in best_factors(terms, lambda layer: len(before[join(layer, "A")])):
        key_A, key_B = _pair(layer)
        old_A, old_B = before[key_A], before[key_B]
        steps[key_A], steps[key_B] = np.zeros_like(old_A), -old_B
        # a layer narrower than its rank has fewer directions than A has rows
        steps[key_A][: len(A)] = A - old_A[: len(A)]
        steps[key_B][:, : len(A)] += B / samples[layer]
    return steps


def best_factors(terms: Terms, rank: Callable[[str], int]) -> Iterator[tuple[str, Array, Array]]:
    """Each layer with the A and B whose product is nearest to the layer's sum of terms.

    A's rows are orthonormal, and B's columns are as long as the singular values. A and B have this
    rank, or the sum's rank where that is lower. A layer's memory is freed before the next layer.
    """
    # an orthonormal Q from random columns, improved by one power iteration
    ranges = _bases(_sketches(terms, rank))
    ranges = _bases(_times(terms, _bases(_times(terms, ranges, transposed=True))))
    # the small (QᵀM)ᵀ, whose SVD gives the factors
    projected = _times(terms, ranges, transposed=True)
    while projected:
        layer, columns = projected.popitem()
        u, s, vt = np.linalg.svd(columns.T, full_matrices=False)
        count = min(rank(layer), max(1, int((s > SMALLEST * s[0]).sum())))
        yield layer, vt[:count], ranges.pop(layer) @ (u[:, :count] * s[:count])


def device_terms(
    contributions: Contributions, samples: dict[str, int]
) -> Iterator[tuple[Contribution, Term]]:
    """Each device's layers of which it sent A and B, as the device held them after the round.

    Args:
        samples: filled with the rows behind each layer, counted anew by each call.
    """
    samples.clear()
    for contribution in contributions():
        after = contribution.after()
        for key, A in after.items():
            layer, factor = parse(key).place, parse(key).factor
            B = after.get(join(layer, "B"))
            if factor == "A" and B is not None:
                samples[layer] = samples.get(layer, 0) + contribution.samples
                yield contribution, Term(layer, contribution.samples, A, B)


def _pair(layer: str) -> tuple[str, str]:
    return join(layer, "A"), join(layer, "B")


def _sketches(terms: Terms, rank: Callable[[str], int]) -> Tensors:
    """Each layer's sum times random columns, which the layer's name decides."""
    columns: Tensors = {}
    sketches: Tensors = {}
    for layer, weight, A, B in terms():
        if layer not in columns:
            count = min(rank(layer) + OVER, A.shape[1], len(B))
            draw = np.random.default_rng(crc32(layer.encode()))
            columns[layer] = draw.standard_normal((A.shape[1], count), dtype=np.float32)
        add_to(sketches, layer, B @ (weight * (A @ columns[layer])))
    return sketches


def _times(terms: Terms, columns: Tensors, *, transposed: bool = False) -> Tensors:
    """Each layer's sum, or its transpose, times these columns."""
    sums: Tensors = {}
    for layer, weight, A, B in terms():
        first, second = (B.T, A.T) if transposed else (A, B)
        add_to(sums, layer, second @ (weight * (first @ columns[layer])))
    return sums


def _bases(sketches: Tensors) -> Tensors:
    """Orthonormal columns that span each sketch."""
    return {layer: np.linalg.qr(sketch)[0] for layer, sketch in sketches.items()}


METHOD = Method("flexlora", fedit.METHOD.factors, {"layers": mean_product}, unequal=True, refactored=True)
