"""Version 0 of an adapter: some factors zero, so that it changes nothing, the others drawn.

Devices and node draw the same numbers from the fleet's seed and the key, so version 0 never
travels. Drawn values are uniform in ±1/sqrt(n), n the layer's width: the usual start of a LoRA's A
(Hu et al. 2021; PEFT's kaiming_uniform with a = sqrt(5)).
"""

import numpy as np
from numpy.typing import NDArray

from edge_runtime.methods.interface import WIDTHS, Factor, stream


def initial(key: str, shape: tuple[int, ...], seed: int, factor: Factor) -> NDArray[np.float32]:
    """The start value of a factor.

    Args:
        key: its canonical key.
        shape: in the fleet's rank or a device's.
        seed: the fleet's.
        factor: what the method says of it.
    """
    if factor.start in ("zero", "aligned"):
        return np.zeros(shape, np.float32)
    # of a factor that is no layer's own, the last axis
    width = next((size for axis, size in zip(factor.axes, shape, strict=True) if axis in WIDTHS), shape[-1])
    return ((2 * stream(f"{seed}/{key}").random(shape, dtype=np.float32) - 1) / np.sqrt(width)).astype(
        np.float32
    )
