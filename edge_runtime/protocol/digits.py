"""Small whole numbers, several in a byte, so that zstd's Huffman code comes near their entropy.

    byte = Σ_i (s_i + (base - 1) / 2) · base^i        base 3, 5, 15 or 255: 5, 3, 2 or 1 numbers a byte

A Huffman code gives each byte a whole number of bits, at least one. On bytes of one number each,
that costs half a bit a number where the entropy is 1.6 bits. On bytes of three numbers it costs some
hundredths, and neighbours that are alike cost less than their entropy one by one. zstd codes and
decodes in C, within bounds that it checks itself, ten times as fast as arithmetic coding in NumPy.

A number beyond its base is a stray: its place in the bytes holds the nearest number, and the stray
is listed beside the bytes.
"""

from typing import NamedTuple

import numpy as np
import zstandard
from numpy.typing import NDArray

BASES = {3: 5, 5: 3, 15: 2, 255: 1}  # numbers that a byte holds, by the base
STRAY_SHARE = 1e-3  # share of a tensor's numbers; more of them take the next base
_NUMBERS = {  # of each byte: (256, numbers a byte)
    base: (np.arange(256)[:, None] // base ** np.arange(count) % base - base // 2).astype(np.float32)
    for base, count in BASES.items()
}
# A match of fewer than seven bytes is chance, and costs more than the bytes themselves.
_PARAMETERS = zstandard.ZstdCompressionParameters(
    strategy=zstandard.STRATEGY_FAST, min_match=7, window_log=17, hash_log=12
)


class Digits(NamedTuple):
    """Numbers in bytes."""

    base: int
    content: NDArray[np.uint8]
    places: NDArray[np.int64]  # of the strays, rising
    strays: NDArray[np.int32]


def pack(numbers: NDArray[np.float32]) -> Digits:
    """Pack whole numbers (n,), in the smallest base that few of them are beyond."""
    sizes = np.abs(numbers)
    for base in BASES:
        beyond = np.flatnonzero(sizes > base // 2)
        if beyond.size <= STRAY_SHARE * numbers.size:
            break
    half, count = base // 2, BASES[base]
    shifted = np.full((length(numbers.size, base), count), half, np.uint8)
    shifted.reshape(-1)[: numbers.size] = np.clip(numbers, -half, half) + half
    digits = shifted[:, -1].copy()
    for column in reversed(range(count - 1)):
        digits *= base
        digits += shifted[:, column]
    return Digits(base, digits, beyond, numbers[beyond].astype(np.int32))


def unpack(digits: NDArray[np.uint8], base: int, step: np.float32, size: int) -> NDArray[np.float32]:
    """The first `size` numbers times `step`, without strays. Bytes that `pack` never makes are some number, too."""
    values: NDArray[np.float32] = np.take(_NUMBERS[base] * step, digits, axis=0, mode="clip")
    return values.reshape(-1)[:size]


def length(size: int, base: int) -> int:
    """Bytes that so many numbers take."""
    return -(-size // BASES[base])


def compress(digits: list[NDArray[np.uint8]]) -> bytes:
    """Packed digits in their entropy; no bytes for none."""
    content = b"".join(part.tobytes() for part in digits)
    return zstandard.ZstdCompressor(compression_params=_PARAMETERS).compress(content) if content else b""
