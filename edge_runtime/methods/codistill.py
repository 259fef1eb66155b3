"""codistill: devices of different models learn from what they predict of public texts; nothing else has to fit.

    p_k(y | a)     device k's head on anchor text a, over the labels that k knows
    s_k(a)         how much a is like k's own rows: the root of the share of them whose nearest other row is no nearer than a's
                   nearest row, by the cosine of what the head reads (a conformal p-value, which is 1/2 on average for own rows)
    T(y | a) = Σ_k w_k(a) p_k(y | a) / Σ_k n_k        w_k(a) = n_k · s_k(a) · (1 - H(p_k(· | a)) / log |labels of k|)
    e(a) = Σ_y T(y | a)        t(y | a) = T(y | a)^(1 / temperature), adding up to 1
    loss of a device = own rows + weight · mean over the anchors of e(a) r(a) CE(t(· | a), its prediction)
    r(a) = u(a) + (1 - u(a)) ramp        u(a) = Σ T(y | a) over the y that the device has no rows of / e(a)
    ramp = exp(-5 (1 - done)²), done from 0 in the first round to 1 in the last

A text counts by the evidence e(a) for what it is, 0 to 1: little while the devices have learned little, and where it is like
nobody's rows. A step draws texts in proportion to e r, and the more of them the more r leaves of e. A temperature below 1 makes
targets surer than the devices are; their mean is less sure than each of them.

What the others said is a round old. While devices still learn fast from their own rows it holds them back: they have caught up
with it before the round is over, and a fleet that follows it early agrees on its early mistakes. So it gains its weight
towards the end; but for labels of which a device has no rows, as nothing else teaches it these.

Labels are named alike on all devices. A device that has never met a label learns it from those who have, as its head has a
row for every label that the fleet predicts. A device that is asked about texts of labels it does not know is as sure of a
wrong label as of a right one; what tells is that they are unlike its rows. What it sends is s p, which adds up to s over the
labels, in the adapter's own codec; the node keeps two running sums, whatever the number of devices. In-class methods go on
beside it.
A label that no device of a round predicts keeps the T it has: what one knew who has left goes on being taught.
The method is ours; distillation on public data between models that differ is that of Li & Wang 2019 (arXiv 1910.03581, FedMD),
the ramp that of Laine & Aila 2017 (arXiv 1610.02242).
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from edge_runtime.methods.interface import Array, Contributions, Factor, Method, Tensors, add_to
from edge_runtime.protocol.keys import label_of
from edge_runtime.settings import Codistill

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

P = Factor(("one", "anchors"), trained=True, shared="fleet", start="zero", of="anchors")
T = P._replace(trained=False)
FLOOR = 1e-6  # of a probability


def combined(contributions: Contributions) -> Tensors:
    """The step from the targets that were to the devices' predictions, weighted by how sure they are, for labels they name."""
    sums: dict[str, Any] = {}
    before: Tensors = {}
    samples = 0
    for made in contributions():
        weight = made.samples * _sureness(made.delta)
        samples += made.samples
        for said, value in made.delta.items():
            key = f"anchors.{label_of(said)}.T"
            if key in made.before:
                before[key] = made.before[key]
            add_to(sums, key, weight * value)
    return {key: value / samples - before.get(key, 0) for key, value in sums.items()}


def _sureness(said: Mapping[str, Array]) -> Array:
    """(1, texts): 1 where a device says one label alone, nearly 0 where all are alike."""
    import numpy as np

    p = np.maximum(np.concatenate(list(said.values())), FLOOR)
    p /= p.sum(0)
    entropy = -(p * np.log(p)).sum(0) / np.log(max(len(p), 2))
    return np.maximum(1 - entropy, FLOOR)[None].astype(np.float32)


def learned(told: Array, temperature: float) -> tuple[Array, Array]:
    """e (texts,) and t (texts, labels) of the fleet's T (texts, labels); a label that nobody names stays at 0."""
    import numpy as np

    told = np.maximum(told, 0)
    most = np.maximum(told.max(1, keepdims=True), FLOOR)
    sharp = (told / most) ** (1 / temperature)
    total = np.maximum(sharp.sum(1, keepdims=True), FLOOR)
    return np.minimum(told.sum(1), 1), (sharp / total).astype(np.float32)


def news(told: Array, unmet: "NDArray[np.bool_]") -> Array:
    """How much of T (texts, labels) is of labels that a device has no rows of (labels,): (texts,), 0 to 1."""
    import numpy as np

    told = np.maximum(told, 0)
    found: Array = told[:, unmet].sum(1) / np.maximum(told.sum(1), FLOOR)
    return found


def ramp(round_: int, rounds: int) -> float:
    """The share of its weight that distillation has in a round, counted from 1."""
    return math.exp(-5 * (1 - (round_ - 1) / max(rounds - 1, 1)) ** 2)


def added(method: Method, spec: Codistill) -> Method:
    """The method with predictions beside what it exchanges."""
    scope = P.shared if spec.across else "class"
    factors = {**method.factors, "P": P._replace(shared=scope), "T": T._replace(shared=scope)}

    def sizes(rank: int) -> dict[str, int]:
        return {**method.sizes(rank), "anchors": spec.texts}

    return method._replace(factors=factors, merges={**method.merges, "anchors": combined}, sizes=sizes)
