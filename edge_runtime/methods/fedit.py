"""fedit: the weighted mean of A and of B inside a model class.

    A <- A + Σ_k p_k dA_k,   B <- B + Σ_k p_k dB_k
    p_k = n_k / Σ n over the devices k that hold the tensor

Devices with fewer layers hold fewer tensors, so each tensor is averaged over its holders. The mean
of the factors is not the factors of the mean product: the method is known to be biased there.
Source: Zhang et al. 2023, arXiv 2305.05644 (FedIT); Diao et al. 2021, arXiv 2010.01264 (HeteroFL)
for unequal depths.
"""

from collections import Counter, defaultdict

from edge_runtime.methods.interface import (
    A,
    Array,
    B,
    Contribution,
    Contributions,
    Method,
    Tensors,
    add_to,
)
from edge_runtime.methods.lazy import np
from edge_runtime.protocol.keys import leading


class RunningMean:
    """The mean delta of each entry over the devices that hold the entry, weighted by rows.

    Memory: one sum a tensor, whatever the number of devices.
    """

    def __init__(self) -> None:
        self._sums: Tensors = {}
        self._rows: dict[str, Counter[tuple[int, ...]]] = defaultdict(Counter)  # by key and shape
        self._entry_rows: Tensors = {}  # of tensors that devices trained in part

    def add(self, contribution: Contribution) -> None:
        """Count one device."""
        for key, value in contribution.delta.items():
            if key not in self._sums:
                full = contribution.before.get(key, value)  # in the fleet's rank
                self._sums[key] = np.zeros(full.shape, np.float32)
            if key in contribution.parts:
                rows = np.float32(contribution.samples) * contribution.parts[key]
                self._sums[key] += rows * value
                add_to(self._entry_rows, key, rows)
                continue
            self._sums[key][leading(value.shape)] += contribution.samples * value
            self._rows[key][value.shape] += contribution.samples

    def counts(self, key: str) -> Array:
        """Rows behind each entry of a tensor."""
        counts = np.zeros_like(self._sums[key])
        for shape, rows in self._rows[key].items():
            counts[leading(shape)] += rows
        return counts + self._entry_rows[key] if key in self._entry_rows else counts

    def mean(self) -> Tensors:
        """The mean; 0 where no device holds an entry. Uses up this object."""
        for key, total in self._sums.items():
            counts = self.counts(key)
            # in place: no second copy of the adapter
            np.divide(total, counts, out=total, where=counts > 0)
        return self._sums


def holders_mean(contributions: Contributions) -> Tensors:
    """The mean delta of a round."""
    running = RunningMean()
    for contribution in contributions():
        running.add(contribution)
    return running.mean()


METHOD = Method("fedit", {"A": A, "B": B}, {"layers": holders_mean})
