"""Refuses a weight file that ends before its tensors do, by its header alone: nothing of the weights is read.

    safetensors   u64 length of the header | header: JSON, for each tensor data_offsets from the header's end | tensors
    GGUF          "GGUF" u32 version u64 tensors u64 pairs | pairs | for each tensor name, shape, kind, offset | tensors

Damage inside a tensor cannot be seen here; it gives the checkpoint another digest, and so another model class.
Sources: safetensors' README; docs/gguf.md of ggml.
"""

import math
import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import msgspec

from edge_runtime.errors import InputError

WIDTHS = dict(enumerate((1, 1, 2, 2, 4, 4, 4, 1, None, None, 8, 8, 8)))  # bytes of a GGUF value by its kind
STRING, ARRAY = 8, 9
VERSIONS, DIMENSIONS = (2, 3), 4


class Place(NamedTuple):
    """A tensor's bytes in its file, from first to before end; in a GGUF file also its shape, as torch has it, and its kind."""

    first: int
    end: int
    shape: tuple[int, ...] = ()
    kind: int = 0


def tensors(path: Path) -> dict[str, Place]:
    """The tensors in a .gguf or .safetensors file by their names, after a check that all of them lie inside it.

    Raises:
        InputError: the file is cut short (the first tensor outside is named, with bytes seen and needed), or its header is
            damaged, or it cannot be read.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            header = _Header(path, stream, size)
            places = _gguf(header) if path.suffix == ".gguf" else _safetensors(header)
    except (OSError, ValueError) as error:  # msgspec's errors are ValueErrors too
        raise InputError(f"{path} cannot be read: {error}") from error
    whole = max((place.end for place in places.values()), default=0)
    for name, place in sorted(places.items(), key=lambda item: item[1]):
        if place.end > size:
            raise InputError(
                f"{path} is cut short: it has {size} bytes and needs {whole}; the first tensor that is not all there is {name}, "
                f"bytes {place.first} to {place.end}; copy the file again"
            )
    return places


def files(folder: Path) -> list[Path]:
    """The .safetensors files of a model folder: those its index names, else all.

    Raises:
        InputError: the index cannot be read.
    """
    listing = folder / "model.safetensors.index.json"
    if not listing.exists():
        return sorted(folder.glob("*.safetensors"))
    try:
        named = msgspec.json.decode(listing.read_bytes(), type=_Index).weight_map.values()
    except (OSError, ValueError) as error:
        raise InputError(f"{listing} cannot be read: {error}") from error
    return sorted({folder / file for file in named})


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


class _Header:
    """Reads a header's parts, none beyond the file's end."""

    def __init__(self, path: Path, stream: BinaryIO, size: int) -> None:
        self._path, self._stream, self._size = path, stream, size

    @property
    def at(self) -> int:
        return self._stream.tell()

    def take(self, count: int) -> bytes:
        self._refuse(count)
        return self._stream.read(count)

    def skip(self, count: int) -> None:
        self._refuse(count)
        self._stream.seek(count, 1)

    def number(self, form: str) -> Any:
        return struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))[0]

    def _refuse(self, count: int) -> None:
        if self.at + count > self._size:
            raise InputError(
                f"{self._path} is cut short or damaged: it has {self._size} bytes, and its header alone, which lists the "
                f"tensors, needs {self.at + count} or more; copy the file again"
            )


# --- safetensors


class _Place(msgspec.Struct):
    data_offsets: tuple[int, int]


def _safetensors(header: _Header) -> dict[str, Place]:
    listed = msgspec.json.decode(header.take(header.number("Q")), type=dict[str, msgspec.Raw])
    listed.pop("__metadata__", None)
    start = header.at
    found = {name: msgspec.json.decode(entry, type=_Place).data_offsets for name, entry in listed.items()}
    return {name: Place(start + first, start + end) for name, (first, end) in found.items()}


# --- GGUF


def _gguf(header: _Header) -> dict[str, Place]:
    import gguf  # 2 MiB that a trainer of other files does without

    kinds = {int(kind): kind for kind in gguf.GGMLQuantizationType}
    if header.take(4) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    if (version := header.number("I")) not in VERSIONS:
        raise ValueError(
            f"its version is {version}, but has to be one of {VERSIONS}, least significant byte first"
        )
    count, pairs, alignment = header.number("Q"), header.number("Q"), gguf.GGUF_DEFAULT_ALIGNMENT
    for _ in range(pairs):
        key, kind = header.take(header.number("Q")), header.number("I")
        if key == b"general.alignment":
            alignment = header.number("I")
        else:
            _skip(header, kind)
    if not alignment:
        raise ValueError("its general.alignment is 0")
    found = {}
    for _ in range(count):
        name = header.take(header.number("Q")).decode()
        if (dimensions := header.number("I")) > DIMENSIONS:
            raise ValueError(f"{name} has {dimensions} dimensions, but GGUF allows {DIMENSIONS}")
        shape = tuple(header.number("Q") for _ in range(dimensions))[::-1]
        if (kind := header.number("I")) not in kinds:
            raise ValueError(f"{name} is of kind {kind}, which the installed gguf package does not know")
        block, block_bytes = gguf.GGML_QUANT_SIZES[kinds[kind]]
        first = header.number("Q")
        found[name] = Place(first, first + math.prod(shape) // block * block_bytes, shape, kind)
    start = -(-header.at // alignment) * alignment
    return {
        name: place._replace(first=start + place.first, end=start + place.end)
        for name, place in found.items()
    }


def _skip(header: _Header, kind: int) -> None:
    """A value of this kind; an array's length is checked before it is walked."""
    count = 1
    if kind == ARRAY:
        kind, count = header.number("I"), header.number("Q")
    if kind == STRING:
        for _ in range(count):
            header.skip(header.number("Q"))
    elif width := WIDTHS.get(kind):
        header.skip(count * width)
    else:
        raise ValueError(f"a value in its header is of kind {kind}, which GGUF does not have")
