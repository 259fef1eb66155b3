"""The version's step from the mean delta of a round: a server step, and momentum.

    v <- momentum · v + mean delta,   version <- version + server_step · v

v starts at 0; each tensor of the adapter and the head has one. A tensor that no device of a round
sent stays, and so does its v. With server_step 1 and momentum 0 the step is the mean delta, and so
is the first of a label's row, most of which is the row's start (methods/head_start.py).

Devices that start from one version move away from it in different directions, so their mean delta
is shorter than each delta, and shorter than the step that is best for their mean loss. A step above
1 makes up for that, as long as it is not too long. Momentum lets the step grow to server_step / (1 -
momentum) mean deltas where rounds agree.
Source: Hsu et al. 2019, arXiv 1909.06335 (FedAvgM); Jhunjhunwala et al. 2023, arXiv 2301.09604
(FedExP), for steps above 1.
"""

from edge_runtime.methods.interface import Array, Tensors
from edge_runtime.settings import MethodChoice


def step(key: str, mean: Array, choice: MethodChoice, momenta: Tensors) -> Array:
    """The step of a tensor.

    Args:
        mean: the mean delta of the round; with momentum it becomes the tensor's new v, in place.
        momenta: v by key.
    """
    if choice.momentum:
        mean += choice.momentum * momenta.get(key, 0)
        momenta[key] = mean
    return choice.server_step * mean
