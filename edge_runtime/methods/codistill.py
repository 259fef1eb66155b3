"""codistill: devices of different models learn from each other's predictions on public texts.

    p_k(y | a)     device k's head on anchor text a, over the labels that k knows
    s_k(a)         how much a is like k's own rows: the root of the share of k's rows whose nearest
                   other row is no nearer than a's nearest row, by the cosine of the head's input
                   (a conformal p-value: 1/2 on average for k's own rows)
    T(y | a) = Σ_k w_k(a) p_k(y | a) / Σ_k n_k
    w_k(a) = n_k · s_k(a) · (1 - H(p_k(· | a)) / log |labels of k|)
    e(a) = Σ_y T(y | a)        t(y | a) = T(y | a)^(1 / temperature), adding up to 1
    loss of a device = own rows + weight · mean over the anchors of e(a) r(a) CE(t(· | a), p)
    r(a) = u(a) + (1 - u(a)) ramp
    u(a) = Σ T(y | a) over the y that the device has no rows of / e(a)
    ramp = exp(-5 (1 - progress)²), progress from 0 in the first round to 1 in the last

e(a), 0 to 1, is the evidence for a text's label. It is small while the devices have learned little,
and where the text is like nobody's rows. A step draws texts in proportion to e r, and more of them
the closer r is to 1. A temperature below 1 makes targets surer than the devices are; the mean of
their predictions is less sure than each prediction.

Predictions are a round old. While devices still learn fast from their own rows, old predictions
hold them back: a device overtakes them within the round, and a fleet that follows them early agrees
on its early mistakes. Therefore the ramp. Labels of which a device has no rows are exempt from the
ramp, as nothing else teaches the device these labels.

`votes` chooses the teacher. The equations above are "weighted"; two others are controls for studies:

    mean     n_k = s_k(a) = w_k(a) = 1: the plain mean of all predictions, FedMD
    oracle   each device sends the true label of each text in place of p_k, with s_k(a) = 1: a perfect
             teacher

Labels have the same name on all devices. The head has a row for every label that the fleet
predicts, so a device learns a label that it never met. On texts of labels that a device does not
know, the device is as sure of a wrong label as of a right label; s_k(a) is small there, as the
texts are unlike its rows. A device sends s p, which adds up to s over the labels, in the adapter's
own codec. The node keeps two running sums, whatever the number of devices. In-class methods run
beside codistill. A label that no device of a round predicts keeps its last T: knowledge of devices
that have left is still taught.

Source: the method is ours; distillation on public data between different models is that of Li &
Wang 2019, arXiv 1910.03581 (FedMD), whose devices send class scores; the ramp that of Laine & Aila
2017, arXiv 1610.02242.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

from edge_runtime.methods.interface import Array, Contributions, Factor, Method, Scope, Tensors, add_to
from edge_runtime.methods.lazy import np
from edge_runtime.protocol.keys import join, parse
from edge_runtime.settings import Codistill, Public

P = Factor(("one", "anchors"), trained=True, shared="fleet", start="zero", of="anchors")
T = P._replace(trained=False)
FLOOR = 1e-6  # of a probability


def combined(contributions: Contributions, *, plain: bool = False) -> Tensors:
    """The step from the last T to the devices' mean, for the labels that they predict.

    plain: every device and text counts the same.
    """
    sums: dict[str, Any] = {}
    before: Tensors = {}
    samples = 0
    for contribution in contributions():
        rows = 1 if plain else contribution.samples
        weight = 1 if plain else rows * _certainty(contribution.delta)
        samples += rows
        for predicted, value in contribution.delta.items():
            key = join(parse(predicted).place, "T")
            if key in contribution.before:
                before[key] = contribution.before[key]
            add_to(sums, key, weight * value)
    return {key: value / samples - before.get(key, 0) for key, value in sums.items()}


def _certainty(predictions: Mapping[str, Array]) -> Array:
    """(1, texts): 1 for a prediction of one label, nearly 0 where all labels are equal."""
    p = np.maximum(np.concatenate(list(predictions.values())), FLOOR)
    p /= p.sum(0)
    entropy = -(p * np.log(p)).sum(0) / np.log(max(len(p), 2))
    return np.maximum(1 - entropy, FLOOR)[None].astype(np.float32)


def learned(targets: Array, temperature: float) -> tuple[Array, Array]:
    """e (texts,) and t (texts, labels) of the fleet's T (texts, labels)."""
    targets = np.maximum(targets, 0)
    highest = np.maximum(targets.max(1, keepdims=True), FLOOR)
    sharp = (targets / highest) ** (1 / temperature)
    total = np.maximum(sharp.sum(1, keepdims=True), FLOOR)
    return np.minimum(targets.sum(1), 1), (sharp / total).astype(np.float32)


def news(targets: Array, unmet: list[bool]) -> Array:
    """u (texts,) of the fleet's T (texts, labels). unmet: by label, whether the device has no row."""
    targets = np.maximum(targets, 0)
    share: Array = targets[:, unmet].sum(1) / np.maximum(targets.sum(1), FLOOR)
    return share


def ramp(round_: int, rounds: int) -> float:
    """The share of its weight that distillation has in a round, counted from 1."""
    return math.exp(-5 * (1 - (round_ - 1) / max(rounds - 1, 1)) ** 2)


def added(method: Method, public: Public, spec: Codistill) -> Method:
    """The method with predictions beside its own exchange."""
    scope: Scope = "fleet" if spec.across else "class"
    return method._replace(
        factors={**method.factors, "P": P._replace(shared=scope), "T": T._replace(shared=scope)},
        merges={**method.merges, "anchors": partial(combined, plain=spec.votes == "mean")},
        sizes=lambda rank: {**method.sizes(rank), "anchors": public.texts},
    )
