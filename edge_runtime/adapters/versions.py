"""The version that devices start a round from: the sum of a chain of artifacts.

    P_r = P_{r-1} + decode(artifact_r)        P before a chain's first artifact: version 0
    artifact_r = encode(master_r - P_{r-1})   made by the node (aggregator/publish.py)

Devices draw version 0 themselves, and fetch the artifacts of the chain that they have not. Node and
devices make P of the same files by the same additions, so they have the same numbers, and what
rounding loses of a version is in the difference that the next version sends.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

from edge_runtime.adapters.initial import initial
from edge_runtime.methods.interface import Method
from edge_runtime.protocol import codec


def published(
    chain: Iterable[Path], seed: int, method: Method, select: Callable[[str], bool] = lambda key: True
) -> codec.Tensors:
    """The tensors of a version whose keys `select` accepts, in the fleet's full rank; none of no chain.

    Args:
        chain: encoded artifacts in their order.
        seed: the fleet's.

    Raises:
        InputError: an artifact is malformed.
    """
    state: codec.Tensors = {}
    for artifact in chain:
        for key, difference in codec.items(artifact.read_bytes(), select):
            if key not in state:
                state[key] = initial(key, difference.shape, seed, method.factor(key))
            state[key] += difference
    return state
