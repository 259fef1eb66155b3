"""ffa: A is drawn once and frozen; B is averaged inside a model class.

    B <- B + Σ_k p_k dB_k,   p_k = n_k / Σ n over the devices k that hold the tensor

All devices have the same A, so the mean of the products is the product of the mean: the merge is
exact. A device sends half of the bytes of `fedit`.
Source: Sun et al. 2024, arXiv 2403.12313 (FFA-LoRA).
"""

from edge_runtime.methods.fedit import holders_mean
from edge_runtime.methods.interface import A, B, Method

METHOD = Method("ffa", {"A": A._replace(trained=False), "B": B}, {"layers": holders_mean})
