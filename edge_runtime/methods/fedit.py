"""fedit: the weighted mean of A and of B inside a model class.

    A <- A + Σ_k p_k dA_k,   B <- B + Σ_k p_k dB_k,   p_k = n_k / Σ n over the devices k that hold the tensor

Devices with fewer layers hold fewer tensors, so the mean is taken tensor by tensor over its holders, as in
Zhang et al. 2023 (arXiv 2305.05644, FedIT) with the depth rule of Diao et al. 2021 (arXiv 2010.01264, HeteroFL).
A mean of factors is not the factors of the mean product; the method is known to be biased there.
"""

import numpy as np

from edge_runtime.methods.interface import Contribution, Factor, Method, Tensors


class HoldersMean:
    """Running weighted sums; two arrays a tensor at most, whatever the number of devices."""

    def __init__(self) -> None:
        self._sums: Tensors = {}
        self._samples: dict[str, int] = {}

    def add(self, made: Contribution) -> None:
        """Take in what one device made, weighted by the rows it trained on."""
        for key, value in made.delta.items():
            if key in self._sums:
                self._sums[key] += made.samples * value
                self._samples[key] += made.samples
            else:
                self._sums[key] = made.samples * value
                self._samples[key] = made.samples

    def merged(self) -> Tensors:
        """The mean delta of every tensor over the devices that sent it."""
        return {key: value / np.float32(self._samples[key]) for key, value in self._sums.items()}


METHOD = Method(
    "fedit",
    {
        "A": Factor(trained=True, shared="class", start="drawn"),
        "B": Factor(trained=True, shared="class", start="zero"),
    },
    HoldersMean,
)
