"""fedsb: A and B are drawn once and frozen; only the core C between them is trained, and its mean taken inside a class.

    y = W x + scale · B C A x,   C <- C + Σ_k p_k dC_k,   p_k = n_k / Σ n over the devices k that hold the tensor

C has r² values whatever the layer's size, and with one A and B for all the merge is exact. The paper takes A and B from the
singular vectors of the first full gradient, which a device that holds packed weights never has; here they are drawn from the
fleet's seed, so that nothing but C ever travels. This start is ours, and weaker at the same rank.
Source: Singhal et al. 2025, arXiv 2502.15436 (Fed-SB).
"""

from edge_runtime.methods.fedit import holders_mean
from edge_runtime.methods.interface import A, B, C, Method

METHOD = Method(
    "fedsb",
    {"A": A._replace(trained=False), "C": C, "B": B._replace(trained=False, start="drawn")},
    {"layers": holders_mean},
)
