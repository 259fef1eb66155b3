"""What an adapter is before anything was trained: A drawn from the fleet's seed, B zero, so that B A = 0.

Devices and node draw the same numbers from the seed and the key, so version 0 never travels. A is uniform in
±1/sqrt(in), the usual start of a LoRA (Hu et al. 2021; PEFT's kaiming_uniform with a = sqrt(5)).
"""

import hashlib

import numpy as np
from numpy.typing import NDArray


def initial(key: str, shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
    """The start value of one factor.

    Args:
        key: canonical key, layers.<i>.<role>.<A|B>.
        shape: (rank, in) for A, (out, rank) for B.
        seed: the fleet's.
    """
    if key.endswith(".B"):
        return np.zeros(shape, np.float32)
    digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
    draw = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
    return ((2 * draw.random(shape, dtype=np.float32) - 1) / np.sqrt(shape[-1])).astype(np.float32)
