"""Where each tensor lies in a weight file, read from the file's header; no weight is read.

    safetensors   u64 header's length | header: JSON, data_offsets of each tensor | tensors
    GGUF          "GGUF" u32 version u64 tensors u64 pairs | pairs | name, shape, kind, offset |
                  tensors

A file that ends before its tensors do is refused. Damage inside a tensor is not noticed here, but
it gives the checkpoint another digest and so another model class.
Sources: safetensors' README; docs/gguf.md of ggml.
"""

import math
import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import msgspec

from edge_runtime.errors import InputError

VALUE_BYTES = dict(enumerate((1, 1, 2, 2, 4, 4, 4, 1, None, None, 8, 8, 8)))  # by GGUF's value kind
STRING, ARRAY = 8, 9
VERSIONS, MOST_DIMENSIONS = (2, 3), 4


class Place(NamedTuple):
    """Where a tensor lies in its file."""

    first: int  # byte of the file
    end: int  # byte after the last
    shape: tuple[int, ...] = ()  # in a GGUF file: as torch has it
    kind: int = 0  # in a GGUF file: gguf.GGMLQuantizationType


def tensors(path: Path) -> dict[str, Place]:
    """The tensors in a .gguf or .safetensors file by name, after a check that all lie inside it.

    Raises:
        InputError: the file is cut short, its header is damaged, or it cannot be read. The message
            names the first tensor outside the file, with bytes seen and needed.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            header = _Header(path, stream, size)
            places = _gguf(header) if path.suffix == ".gguf" else _safetensors(header)
    except (OSError, ValueError) as error:  # msgspec's errors are ValueErrors too
        raise InputError(f"{path} cannot be read: {error}") from error
    needed = max((place.end for place in places.values()), default=0)
    for name, place in sorted(places.items(), key=lambda item: item[1]):
        if place.end > size:
            raise InputError(
                f"{path} is cut short: it has {size} bytes and needs {needed}; the first tensor that is not "
                f"all there is {name}, bytes {place.first} to {place.end}; copy the file again"
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
    """Reads the parts of a header; refuses a part that would lie beyond the file's end."""

    def __init__(self, path: Path, stream: BinaryIO, size: int) -> None:
        self._path, self._stream, self._size = path, stream, size

    @property
    def position(self) -> int:
        """The byte of the file that is read next."""
        return self._stream.tell()

    def take(self, count: int) -> bytes:
        """The next bytes."""
        self._refuse_beyond_end(count)
        return self._stream.read(count)

    def skip(self, count: int) -> None:
        """Leave bytes out."""
        self._refuse_beyond_end(count)
        self._stream.seek(count, 1)

    def number(self, form: str) -> Any:
        """The next number; form: of the struct module, least significant byte first."""
        return struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))[0]

    def _refuse_beyond_end(self, count: int) -> None:
        if self.position + count > self._size:
            raise InputError(
                f"{self._path} is cut short or damaged: it has {self._size} bytes, and its header alone, which "
                f"lists the tensors, needs {self.position + count} or more; copy the file again"
            )


# --- safetensors


class _Entry(msgspec.Struct):
    data_offsets: tuple[int, int]


def _safetensors(header: _Header) -> dict[str, Place]:
    entries = msgspec.json.decode(header.take(header.number("Q")), type=dict[str, msgspec.Raw])
    entries.pop("__metadata__", None)
    start = header.position
    offsets = {name: msgspec.json.decode(entry, type=_Entry).data_offsets for name, entry in entries.items()}
    return {name: Place(start + first, start + end) for name, (first, end) in offsets.items()}


# --- GGUF


def _gguf(header: _Header) -> dict[str, Place]:
    import gguf  # 2 MiB, which a trainer of safetensors files does without

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
            _skip_value(header, kind)
    if not alignment:
        raise ValueError("its general.alignment is 0")
    kinds = {int(kind): gguf.GGML_QUANT_SIZES[kind] for kind in gguf.GGMLQuantizationType}
    places = {}
    for _ in range(count):
        name = header.take(header.number("Q")).decode()
        places[name] = _gguf_place(header, name, kinds)
    start = -(-header.position // alignment) * alignment
    return {
        name: place._replace(first=start + place.first, end=start + place.end)
        for name, place in places.items()
    }


def _gguf_place(header: _Header, name: str, kinds: dict[int, tuple[int, int]]) -> Place:
    """A tensor's place from the first tensor on. kinds: values and bytes of a block, by kind."""
    if (dimensions := header.number("I")) > MOST_DIMENSIONS:
        raise ValueError(f"{name} has {dimensions} dimensions, but GGUF allows {MOST_DIMENSIONS}")
    shape = tuple(header.number("Q") for _ in range(dimensions))[::-1]
    if (kind := header.number("I")) not in kinds:
        raise ValueError(f"{name} is of kind {kind}, which the installed gguf package does not know")
    block, block_bytes = kinds[kind]
    first = header.number("Q")
    return Place(first, first + math.prod(shape) // block * block_bytes, shape, kind)


def _skip_value(header: _Header, kind: int) -> None:
    count = 1
    if kind == ARRAY:
        kind, count = header.number("I"), header.number("Q")
    if kind == STRING:
        for _ in range(count):  # a wrong count ends at the file's end
            header.skip(header.number("Q"))
    elif width := VALUE_BYTES.get(kind):
        header.skip(count * width)
    else:
        raise ValueError(f"a value in its header is of kind {kind}, which GGUF does not have")
