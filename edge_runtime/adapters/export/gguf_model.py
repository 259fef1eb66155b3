"""Writes a GGUF model out of another: the layers of a slice, with an adapter merged or not.

    metadata    byte for byte, but for the number of layers and lists that have a value a layer
    tensors     byte for byte, the layers numbered from 0
                with a merged adapter: W + B A in place of W, in W's format or a given one

A model that is split over files becomes one file. Blocks that the `gguf` package cannot make
(K-quants) are held in q8_0 where the adapter changes them. A few rows are in memory at a time.
Source of the format: docs/gguf.md of ggml.
"""

import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray

from edge_runtime.adapters.export import gguf_adapter
from edge_runtime.adapters.export.checkpoint import product
from edge_runtime.adapters.learned import Array, Learned
from edge_runtime.models import gguf_header
from edge_runtime.models.gguf_header import Contents
from edge_runtime.models.headers import Place
from edge_runtime.models.readers import PIECE_VALUES

Format = Literal["f32", "f16", "bf16", "q8_0"]
FALLBACK = Kind.Q8_0
LAYER = re.compile(r"blk\.(\d+)\.")


class Target(NamedTuple):
    """A tensor to write."""

    name: str
    place: Place  # in the source
    kind: Kind
    factors: tuple[Array, Array] | None = None  # A, and B with its rows in the file's order


def write(learned: Learned, source: Path, path: Path, *, merged: bool, format: Format | None = None) -> None:
    """Write the file.

    Args:
        source: a GGUF file of the whole checkpoint, or the first of several.
        merged: add the adapter's products to the weights.
        format: of the tensors that the adapter changes; None: the source's.
    """
    contents = gguf_header.read(source)
    tensors = _tensors(contents, learned, merged, format)
    alignment = contents.metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    pairs = list(_pairs(contents, learned.layers))
    with path.open("wb") as stream:
        stream.write(struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(pairs)))
        stream.writelines(pairs)
        offset = 0
        for tensor in tensors:
            name, shape = tensor.name.encode(), tensor.place.shape[::-1]
            stream.write(struct.pack("<Q", len(name)) + name + struct.pack("<I", len(shape)))
            stream.write(struct.pack(f"<{len(shape)}QIQ", *shape, tensor.kind, offset))
            offset += -(-_bytes(tensor) // alignment) * alignment
        for tensor in tensors:
            stream.write(b"\0" * (-stream.tell() % alignment))
            with contents.files[tensor.place.shard].open("rb") as file:
                for blocks in _blocks(tensor, file):
                    stream.write(np.ascontiguousarray(blocks).data)
        stream.write(b"\0" * (-stream.tell() % alignment))


def _pairs(contents: Contents, layers: tuple[int, ...]) -> Iterator[bytes]:
    """The slice's metadata, pair by pair."""
    prefix = contents.metadata["general.architecture"]
    count = contents.metadata[f"{prefix}.block_count"]
    with contents.files[0].open("rb") as stream:
        for key, (first, end) in gguf_header.spans(contents.files[0]).items():
            stream.seek(first)
            pair = stream.read(end - first)
            value = contents.metadata[key]
            if key == f"{prefix}.block_count":
                pair = pair[:-4] + struct.pack("<I", len(layers))
            elif key.startswith(f"{prefix}.") and isinstance(value, tuple) and len(value) == count:
                pair = _of_layers(pair, len(key.encode()), count, layers)
            if not key.startswith("split."):
                yield pair


def _of_layers(pair: bytes, key_bytes: int, count: int, layers: tuple[int, ...]) -> bytes:
    """A list with a number for each layer, for these layers alone."""
    start = 8 + key_bytes + 4 + 4  # key, kind, kind of the values; then their number
    values = pair[start + 8 :]
    size = len(values) // count
    kept = b"".join(values[size * layer : size * (layer + 1)] for layer in layers)
    return pair[:start] + struct.pack("<Q", len(layers)) + kept


def _tensors(contents: Contents, learned: Learned, merged: bool, format: Format | None) -> list[Target]:
    names = gguf_adapter.tensor_names(learned)
    factors = {}
    for (layer, role), (A, B) in learned.factors.items():
        rows = gguf_adapter.interleaved(B, gguf_adapter.heads(learned, role))
        factors[names[layer, role]] = (A, rows)
    tensors = []
    for name, place in contents.tensors.items():
        if match := LAYER.match(name):
            if int(match[1]) not in learned.layers:
                continue
            name = LAYER.sub(f"blk.{learned.layers.index(int(match[1]))}.", name)
        kind = Kind(place.kind)
        if merged and name in factors:
            kind = Kind[format.upper()] if format else kind if _writable(kind) else FALLBACK
            tensors.append(Target(name, place, kind, factors[name]))
        else:
            tensors.append(Target(name, place, kind))
    return tensors


def _writable(kind: Kind) -> bool:
    """Whether the `gguf` package makes blocks of this kind, which only an attempt shows."""
    try:
        gguf.quants.quantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][0]), np.float32), kind)
    except NotImplementedError:
        return False
    return True


def _row_bytes(width: int, kind: int) -> int:
    values, size = gguf.GGML_QUANT_SIZES[Kind(kind)]
    return width // values * size


def _bytes(tensor: Target) -> int:
    *rows, width = tensor.place.shape
    return int(np.prod(rows, dtype=np.int64)) * _row_bytes(width, tensor.kind)


def _blocks(tensor: Target, file: BinaryIO) -> Iterator[NDArray[Any]]:
    """The tensor's bytes, a few rows at a time."""
    place = tensor.place
    *_, width = place.shape
    row_bytes, first = _row_bytes(width, place.kind), 0
    step = max(PIECE_VALUES // width, 1)
    file.seek(place.first)
    rows = (place.end - place.first) // row_bytes
    for first in range(0, rows, step):
        blocks = np.fromfile(file, np.uint8, min(step, rows - first) * row_bytes).reshape(-1, row_bytes)
        if tensor.factors is None:
            yield blocks
        else:
            values = gguf.quants.dequantize(blocks, Kind(place.kind)).astype(np.float32)
            values += product(tensor.factors, slice(first, first + len(blocks))).numpy()
            yield gguf.quants.quantize(values, tensor.kind)
