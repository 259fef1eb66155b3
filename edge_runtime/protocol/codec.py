"""Delta and adapter state on the wire: 8-bit blocks, entropy-coded.

    payload = b"EDC1" · header length (4 bytes) · header (JSON: keys, shapes, a length) · zstd(values · scales · completions)

Each run of 64 values of a tensor has one float32 scale, max|v| / 127; a value is scale · q. On the sender's side error
feedback carries what rounding lost into the next round: encode(delta + residual), residual <- delta + residual - decoded.
Source: Dettmers et al. 2021, arXiv 2110.02861 (block-wise 8 bits); Karimireddy et al. 2019, arXiv 1901.09847 (feedback).
"""

import math
from collections.abc import Callable, Mapping, Sequence

import msgspec
import numpy as np
import zstandard
from numpy.typing import NDArray

from edge_runtime.errors import InputError
from edge_runtime.protocol.completion import Completion

MAGIC = b"EDC1"
BLOCK = 64
SMALLEST_SCALE = np.finfo(
    np.float32
).tiny  # below it a scale has too few bits left, and the block counts as zero
LARGEST_SCALE = np.finfo(np.float32).max / 128  # above it scale · q would be infinite
LARGEST_SIZE = 1 << 31  # values of all tensors together
LARGEST_COMPLETIONS_BYTES = 1 << 24
LARGEST_HEADER_BYTES = 1 << 24  # a model of 100 layers takes 0.1 MB

Tensors = dict[str, NDArray[np.float32]]


class Header(msgspec.Struct, frozen=True, omit_defaults=True):
    """Keys and shapes, in the order in which the values follow; and the length of the completions, as JSON."""

    shapes: dict[str, tuple[int, ...]]
    completions_bytes: int = 0


def encode(tensors: Mapping[str, NDArray[np.float32]], completions: Sequence[Completion] = ()) -> bytes:
    """Encode float32 tensors, and completions beside them as they are.

    Raises:
        InputError: a value is not finite, or within a hundredth of float32's largest; or the completions take too much.
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
    said = msgspec.json.encode(completions) if completions else b""
    if len(said) > LARGEST_COMPLETIONS_BYTES:
        raise InputError(
            f"the completions take {len(said)} bytes, but {LARGEST_COMPLETIONS_BYTES} is the most"
        )
    header = msgspec.json.encode(Header({key: tensor.shape for key, tensor in tensors.items()}, len(said)))
    parts = (*(part.tobytes() for part in (*values, *scales)), said)
    body = zstandard.ZstdCompressor(level=3).compress(b"".join(parts))
    return MAGIC + len(header).to_bytes(4, "big") + header + body


def decode(payload: bytes, wanted: Callable[[str], bool] = lambda key: True) -> Tensors:
    """Decode a payload, or the tensors of it whose keys are wanted; what its shapes say has to be checked before (see
    `shapes`), the rest is checked here.

    Raises:
        InputError: the payload is malformed, or holds a scale that is not finite. Nothing larger than the declared shapes
            is ever allocated.
    """
    declared, raw = _body(payload)
    sizes = [math.prod(shape) for shape in declared.values()]
    blocks = [-(-size // BLOCK) for size in sizes]
    scales = np.frombuffer(raw, "<f4", sum(blocks), sum(sizes))
    if not ((scales >= 0) & (scales <= LARGEST_SCALE)).all():
        raise InputError("the payload has a scale that is negative or not finite")
    tensors, value, scale = {}, 0, 0
    for (key, shape), size, count in zip(declared.items(), sizes, blocks, strict=True):
        if wanted(key):
            decoded = np.zeros((count, BLOCK), np.float32)
            decoded.reshape(-1)[:size] = np.frombuffer(raw, np.int8, size, value)
            decoded *= scales[scale : scale + count, None]
            tensors[key] = decoded.reshape(-1)[:size].reshape(shape)
        value, scale = value + size, scale + count
    return tensors


def completions(payload: bytes) -> list[Completion]:
    """The completions of a payload; raises InputError as decode does, and where one has no number, text and confidence."""
    header, _ = _header(payload)
    if not header.completions_bytes:
        return []
    _, raw = _body(payload)
    try:
        return msgspec.json.decode(raw[-header.completions_bytes :], type=list[Completion])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"the payload's completions cannot be read: {error}") from error


def shapes(payload: bytes) -> dict[str, tuple[int, ...]]:
    """The keys and shapes a payload declares; raises InputError when its header cannot be read."""
    return _header(payload)[0].shapes


def _body(payload: bytes) -> tuple[dict[str, tuple[int, ...]], bytes]:
    """The declared shapes, and values, scales and completions as they were before compression."""
    header, split = _header(payload)
    sizes = [math.prod(shape) for shape in header.shapes.values()]
    expected = sum(size + 4 * -(-size // BLOCK) for size in sizes) + header.completions_bytes
    try:
        with zstandard.ZstdDecompressor().stream_reader(payload[split:]) as stream:
            raw: bytes = stream.read(
                expected + 1
            )  # one more, to see a body that holds too much without expanding it
    except zstandard.ZstdError as error:
        raise InputError(f"the payload cannot be decompressed: {error}") from error
    if len(raw) != expected:
        raise InputError(f"the payload holds {len(raw)} bytes of values, its header needs {expected}")
    return header.shapes, raw


def _header(payload: bytes) -> tuple[Header, int]:
    """The header, and where the values begin."""
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
    if any(dimension < 1 for shape in header.shapes.values() for dimension in shape):
        raise InputError("the payload declares an empty tensor")
    if sum(map(math.prod, header.shapes.values())) > LARGEST_SIZE:
        raise InputError(f"the payload declares more than {LARGEST_SIZE} values")
    if not 0 <= header.completions_bytes <= LARGEST_COMPLETIONS_BYTES:
        raise InputError(f"the payload declares {header.completions_bytes} bytes of completions")
    return header, split
