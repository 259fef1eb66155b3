"""fedsa: the mean of A inside a model class; each device keeps a B of its own.

    A <- A + Σ_k p_k dA_k,   p_k = n_k / Σ n over the devices k that hold the tensor

A is taken to hold what the devices' tasks have in common, B what each has to itself. The mean of products B_k A_k is no
product any more, and nobody needs it: no two devices have the same model.
Source: Guo et al. 2024, arXiv 2410.01463 (FedSA-LoRA).
"""

from edge_runtime.methods.fedit import holders_mean
from edge_runtime.methods.interface import A, B, Method

METHOD = Method("fedsa", {"A": A, "B": B._replace(shared="private")}, {"layers": holders_mean})
