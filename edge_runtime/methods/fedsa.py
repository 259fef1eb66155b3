"""fedsa: A is averaged inside a model class; each device trains a private B.

    A <- A + Σ_k p_k dA_k,   p_k = n_k / Σ n over the devices k that hold the tensor

The paper's assumption: A holds the features that the devices' tasks share, B holds each task's own.
No two devices have the same product B_k A_k, so there is no common model and none is needed.
Source: Guo et al. 2024, arXiv 2410.01463 (FedSA-LoRA).
"""

from edge_runtime.methods.fedit import holders_mean
from edge_runtime.methods.interface import A, B, Method

METHOD = Method("fedsa", {"A": A, "B": B._replace(shared="private")}, {"layers": holders_mean})
