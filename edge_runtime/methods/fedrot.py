"""fedrot: the factors of each device are turned towards the version's before the mean.

    R_k = U Vᵀ,   U S Vᵀ = A_k Aᵀ / ‖A‖² + B_kᵀ B / ‖B‖²
    A <- Σ_k p_k R_kᵀ A_k,   B <- Σ_k p_k B_k R_k
    p_k = n_k / Σ n over the devices that hold the layer

For each orthogonal R, Rᵀ A_k and B_k R have the same product. Devices that have learned the same can
so differ in their factors, which the mean of fedit lets cancel. R_k is the R of least
‖Rᵀ A_k - A‖² / ‖A‖² + ‖B_k R - B‖² / ‖B‖². The node turns; devices train and send as with fedit.
Source: Zhang et al. 2026, arXiv 2602.23638 (FedRot-LoRA). There a device turns its own factors, from
the second round on, towards A and towards B in turn. Both at once, on the node, is ours.
"""

from edge_runtime.methods import fedit
from edge_runtime.methods.fedit import RunningMean
from edge_runtime.methods.interface import Array, Contribution, Contributions, Method, Tensors, layer_factors
from edge_runtime.methods.lazy import np
from edge_runtime.protocol.keys import join

TINY = 1e-12


def aligned_mean(contributions: Contributions) -> Tensors:
    """The step to the mean of the turned factors; memory is that of fedit."""
    running = RunningMean()
    for contribution in contributions():
        running.add(contribution._replace(delta=_turned(contribution)))
    return running.mean()


def _turned(contribution: Contribution) -> Tensors:
    """The device's delta, as if the device had trained the turned factors."""
    steps: Tensors = {}
    for layer, A, B in layer_factors(contribution.after()):
        last_A, last_B = (contribution.before[join(layer, name)] for name in "AB")
        u, _, vt = np.linalg.svd(A @ last_A.T / _square(last_A) + B.T @ last_B / _square(last_B))
        R = u @ vt
        steps |= {join(layer, "A"): R.T @ A - last_A, join(layer, "B"): B @ R - last_B}
    return steps


def _square(factor: Array) -> float:
    return max(float(np.linalg.norm(factor)) ** 2, TINY)


METHOD = Method("fedrot", fedit.METHOD.factors, {"layers": aligned_mean})
