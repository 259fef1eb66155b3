"""flexlora: the mean of the products B A over devices of unequal ranks, and its best factors in each device's rank.

    M = Σ_k p_k B_k A_k,   p_k = n_k / Σ n over the devices k that hold the layer,   M ≈ U S Vᵀ,   B <- U S,   A <- Vᵀ

The factors come in the order of their singular values, so the leading r of them are the best for a device of rank r. A's rows
are of unit length whatever M's rank is: none of them is dead for the next round.

M is never made. Its range is found by sketches, M times a few columns, which are sums over devices of small products: one
pass over the updates finds Q from random columns, two more improve it (a power iteration), and the last takes QᵀM, whose SVD
is small. So memory does not grow with the number of devices; every update is read five times, once to count. A sketch has
twice as many columns as the factors have ranks: up to there M is exact, beyond it nearly.
Source: Bai et al. 2024, arXiv 2402.11505 (FlexLoRA); Halko et al. 2011, arXiv 0909.4061 (randomised SVD).
"""

from collections.abc import Callable, Iterable, Iterator
from zlib import crc32

from edge_runtime.methods.interface import Array, Contribution, Factor, Method, Tensors

OVER = 2  # columns of a sketch, of the factors' rank
Contributions = Callable[[], Iterable[Contribution]]


def mean_product(contributions: Contributions) -> Tensors:
    """The step from the factors that were to those of the mean product."""
    import numpy as np

    before: Tensors = {}
    samples: dict[str, int] = {}
    sketches: Tensors = {}
    for made in contributions():
        for layer, A, B in _layers(made):
            if layer not in samples:
                before |= {f"{layer}.{factor}": made.before[f"{layer}.{factor}"] for factor in "AB"}
                columns = min(OVER * len(before[f"{layer}.A"]), A.shape[1], len(B))
                draw = np.random.default_rng(crc32(layer.encode()))
                sketches[layer] = draw.standard_normal((A.shape[1], columns), dtype=np.float32)
            samples[layer] = samples.get(layer, 0) + made.samples
    ranges = _bases(_times(contributions, sketches))
    ranges = _bases(_times(contributions, _bases(_transposed_times(contributions, ranges))))
    steps: Tensors = {}
    for layer, small in _transposed_times(contributions, ranges).items():
        old = {factor: before[f"{layer}.{factor}"] for factor in "AB"}
        u, s, vt = np.linalg.svd(small.T / samples[layer], full_matrices=False)
        rank = min(
            len(old["A"]), len(s)
        )  # a layer narrower than the rank has fewer directions: the rest of A stays, B's is 0
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


def _times(contributions: Contributions, right: Tensors) -> Tensors:
    """Σ n_k B_k A_k R of each layer: (out, columns)."""
    sums: Tensors = {}
    for made in contributions():
        for layer, A, B in _layers(made):
            _add(sums, layer, made.samples * (B @ (A @ right[layer])))
    return sums


def _transposed_times(contributions: Contributions, left: Tensors) -> Tensors:
    """(Σ n_k B_k A_k)ᵀ L of each layer: (in, columns)."""
    sums: Tensors = {}
    for made in contributions():
        for layer, A, B in _layers(made):
            _add(sums, layer, made.samples * (A.T @ (B.T @ left[layer])))
    return sums


def _add(sums: Tensors, layer: str, value: Array) -> None:
    if layer in sums:
        sums[layer] += value
    else:
        sums[layer] = value


def _bases(sketches: Tensors) -> Tensors:
    """Orthonormal columns that span each sketch."""
    import numpy as np

    return {layer: np.linalg.qr(sketch)[0] for layer, sketch in sketches.items()}


METHOD = Method(
    "flexlora",
    {
        "A": Factor(trained=True, shared="class", start="drawn"),
        "B": Factor(trained=True, shared="class", start="zero"),
    },
    mean_product,
    unequal=True,
    refactored=True,
)
