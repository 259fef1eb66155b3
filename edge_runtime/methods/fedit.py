"""fedit: the weighted mean of A and of B inside a model class.

    A <- A + Σ_k p_k dA_k,   B <- B + Σ_k p_k dB_k,   p_k = n_k / Σ n over the devices k that hold the tensor

Devices with fewer layers hold fewer tensors, so the mean is taken tensor by tensor over its holders, as in
Zhang et al. 2023 (arXiv 2305.05644, FedIT) with the depth rule of Diao et al. 2021 (arXiv 2010.01264, HeteroFL).
A mean of factors is not the factors of the mean product; the method is known to be biased there.
"""

from edge_runtime.methods.interface import A, Array, B, Contribution, Contributions, Method, Tensors
from edge_runtime.protocol.keys import leading


class RunningMean:
    """The mean delta of every tensor over the devices that sent it, where ranks differ entry by entry over those that hold it;
    one sum a tensor, whatever the number of devices."""

    def __init__(self) -> None:
        self._sums: Tensors = {}
        self._held: dict[str, dict[tuple[int, ...], int]] = {}  # samples of each shape that was sent

    def add(self, made: Contribution) -> None:
        """Count one device."""
        import numpy as np

        for key, value in made.delta.items():
            if key not in self._sums:
                self._sums[key], self._held[key] = (
                    np.zeros(made.before.get(key, value).shape, np.float32),
                    {},
                )
            self._sums[key][leading(value.shape)] += made.samples * value
            self._held[key][value.shape] = self._held[key].get(value.shape, 0) + made.samples

    def counts(self, key: str) -> Array:
        """Samples behind each entry of a tensor."""
        import numpy as np

        counts = np.zeros_like(self._sums[key])
        for shape, count in self._held[key].items():
            counts[leading(shape)] += count
        return counts

    def mean(self) -> Tensors:
        """Of what was added; 0 where no device holds an entry. The sums are used up."""
        import numpy as np

        for key, total in self._sums.items():
            counts = self.counts(key)
            np.divide(total, counts, out=total, where=counts > 0)
        return self._sums


def holders_mean(contributions: Contributions) -> Tensors:
    """The mean of a round."""
    running = RunningMean()
    for made in contributions():
        running.add(made)
    return running.mean()


METHOD = Method("fedit", {"A": A, "B": B}, {"layers": holders_mean})
