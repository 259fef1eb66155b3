"""Deltas and adapter states on the wire: 8-bit blocks, entropy-coded.

    payload = b"EDC1" · header length (4 bytes) · header (JSON: keys, shapes, a length) ·
    zstd(values · scales · answers)

Each run of 64 values of a tensor has one float32 scale, max|v| / 127; a value is scale · q. The
sender's error feedback carries the rounding error into the next round: encode(delta + residual),
residual <- delta + residual - decoded. Answers are bytes that this file does not read (see
PublicAnswers in methods/interface.py).
Source: Dettmers et al. 2021, arXiv 2110.02861 (block-wise 8 bits); Karimireddy et al. 2019, arXiv
1901.09847 (feedback).
"""

import math
from collections.abc import Callable, Mapping

import msgspec
import numpy as np
import zstandard
from numpy.typing import NDArray

from edge_runtime.errors import InputError

MAGIC = b"EDC1"
BLOCK = 64
SMALLEST_SCALE = np.finfo(np.float32).tiny  # a smaller scale has few bits; its block counts as 0
LARGEST_SCALE = np.finfo(np.float32).max / 128  # with a larger scale, scale · q would be infinite
LARGEST_SIZE = 1 << 31  # values of all tensors together
LARGEST_ANSWERS_BYTES = 1 << 24
MOST_AXES = 8  # a message that names the shape stays short
LARGEST_HEADER_BYTES = 1 << 24  # a model of 100 layers takes 0.1 MB

Tensors = dict[str, NDArray[np.float32]]


class Header(msgspec.Struct, frozen=True, omit_defaults=True):
    """The payload's table of contents."""

    shapes: dict[str, tuple[int, ...]]  # by key, in the order in which the values follow
    completions_bytes: int = 0  # of the answers, which are completions in every method so far


def encode(tensors: Mapping[str, NDArray[np.float32]], answers: bytes = b"") -> bytes:
    """Encode float32 tensors, with answers beside them.

    Raises:
        InputError: a value is not finite, or within a hundredth of float32's largest; or the
            answers are too long.
    """
    values, scales = [], []
    for key, tensor in tensors.items():
        flat = np.ravel(tensor)
        blocks = np.pad(flat, (0, -flat.size % BLOCK)).reshape(-1, BLOCK)
        scale = (np.abs(blocks).max(axis=1, keepdims=True) / 127).astype("<f4")
        if not (scale <= LARGEST_SCALE).all():
            raise InputError(f"{key} holds a value that is not finite")
        scale[scale < SMALLEST_SCALE] = 0
        quotient = np.divide(blocks, scale, out=np.zeros_like(blocks), where=scale > 0)
        values.append(np.rint(quotient).astype(np.int8).ravel()[: flat.size])
        scales.append(scale.ravel())
    if len(answers) > LARGEST_ANSWERS_BYTES:
        raise InputError(
            f"the completions take {len(answers)} bytes, but {LARGEST_ANSWERS_BYTES} is the most"
        )
    shapes = {key: tensor.shape for key, tensor in tensors.items()}
    header = msgspec.json.encode(Header(shapes, len(answers)))
    parts = (*(part.tobytes() for part in (*values, *scales)), answers)
    body = zstandard.ZstdCompressor(level=3).compress(b"".join(parts))
    return MAGIC + len(header).to_bytes(4, "big") + header + body


def decode(payload: bytes, select: Callable[[str], bool] = lambda key: True) -> Tensors:
    """Decode the tensors of a payload whose keys `select` accepts.

    The caller checks before that the declared shapes (see `shapes`) are acceptable. The function
    checks everything else, and never allocates more than the declared shapes need.

    Raises:
        InputError: the payload is malformed, or holds a scale that is not finite.
    """
    declared, raw = _body(payload)
    sizes = [math.prod(shape) for shape in declared.values()]
    blocks = [-(-size // BLOCK) for size in sizes]
    scales = np.frombuffer(raw, "<f4", sum(blocks), sum(sizes))
    if not ((scales >= 0) & (scales <= LARGEST_SCALE)).all():
        raise InputError("the payload has a scale that is negative or not finite")
    tensors, value, scale = {}, 0, 0
    for (key, shape), size, count in zip(declared.items(), sizes, blocks, strict=True):
        if select(key):
            decoded = np.zeros((count, BLOCK), np.float32)
            decoded.reshape(-1)[:size] = np.frombuffer(raw, np.int8, size, value)
            decoded *= scales[scale : scale + count, None]
            tensors[key] = decoded.reshape(-1)[:size].reshape(shape)
        value, scale = value + size, scale + count
    return tensors


def answers(payload: bytes) -> bytes:
    """The answers of a payload; raises InputError as `decode` does."""
    length = _header(payload)[0].completions_bytes
    return _body(payload)[1][-length:] if length else b""


def shapes(payload: bytes) -> dict[str, tuple[int, ...]]:
    """Declared keys and shapes; raises InputError where the header cannot be read."""
    return _header(payload)[0].shapes


def _body(payload: bytes) -> tuple[dict[str, tuple[int, ...]], bytes]:
    """The declared shapes, and the decompressed values, scales and answers."""
    header, split = _header(payload)
    sizes = [math.prod(shape) for shape in header.shapes.values()]
    expected = sum(size + 4 * -(-size // BLOCK) for size in sizes) + header.completions_bytes
    try:
        with zstandard.ZstdDecompressor().stream_reader(payload[split:]) as stream:
            # one byte more, to detect a body that is too long without expanding it
            raw: bytes = stream.read(expected + 1)
    except zstandard.ZstdError as error:
        raise InputError(f"the payload cannot be decompressed: {error}") from error
    if len(raw) != expected:
        raise InputError(f"the payload holds {len(raw)} bytes of values, its header needs {expected}")
    return header.shapes, raw


def _header(payload: bytes) -> tuple[Header, int]:
    """The header, and the offset of the compressed body."""
    if payload[:4] != MAGIC or len(payload) < 8:
        raise InputError("the payload is no encoded adapter state")
    split = 8 + int.from_bytes(payload[4:8], "big")
    if split > min(len(payload), 8 + LARGEST_HEADER_BYTES):
        raise InputError(
            f"the payload's header cannot be read: it claims {split - 8} bytes of {len(payload)}"
        )
    try:
        header = msgspec.json.decode(payload[8:split], type=Header)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"the payload's header cannot be read: {error}") from error
    if any(len(shape) > MOST_AXES for shape in header.shapes.values()):
        raise InputError(f"the payload declares a tensor of more than {MOST_AXES} axes")
    if any(dimension < 1 for shape in header.shapes.values() for dimension in shape):
        raise InputError("the payload declares an empty tensor")
    if sum(map(math.prod, header.shapes.values())) > LARGEST_SIZE:
        raise InputError(f"the payload declares more than {LARGEST_SIZE} values")
    if not 0 <= header.completions_bytes <= LARGEST_ANSWERS_BYTES:
        raise InputError(f"the payload declares {header.completions_bytes} bytes of completions")
    return header, split
