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


class Place(NamedTuple):
    """Where a tensor lies in its file."""

    first: int  # byte of the file
    end: int  # byte after the last
    shape: tuple[int, ...] = ()  # in a GGUF file: as torch has it
    kind: int = 0  # in a GGUF file: gguf.GGMLQuantizationType


def files(weights: Path) -> dict[str, Path]:
    """The file that each tensor is in, of a GGUF file or a folder of .safetensors files.

    Of a folder, the files that its index names, else all.

    Raises:
        InputError: the index cannot be read; or as `tensors` does for each file.
    """
    listing = weights / "model.safetensors.index.json"
    paths = [weights] if weights.is_file() else sorted(weights.glob("*.safetensors"))
    if listing.exists():
        try:
            index = msgspec.json.decode(listing.read_bytes(), type=_Index)
        except (OSError, ValueError) as error:
            raise InputError(f"{listing} cannot be read: {error}") from error
        paths = sorted({weights / file for file in index.weight_map.values()})
    return {name: path for path in paths for name in tensors(path)}


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def tensors(path: Path) -> dict[str, Place]:
    """The tensors in a .gguf or .safetensors file by name, after a check that all lie inside it.

    Raises:
        InputError: the file is cut short, its header is damaged, or it cannot be read. The message
            names the first tensor outside the file, with bytes seen and needed.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            header = _Header(path, size, stream)
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


class _Header(NamedTuple):
    """Reads the parts of a header in turn."""

    path: Path
    size: int  # bytes of the file
    stream: BinaryIO

    def take(self, count: int, *, skip: bool = False) -> bytes:
        """The next bytes; skip: pass over them. Refuses a part that lies beyond the file's end."""
        end = self.stream.tell() + count
        if end > self.size:
            raise InputError(
                f"{self.path} is cut short or damaged: it has {self.size} bytes, and its header alone, which "
                f"lists the tensors, needs {end} or more; copy the file again"
            )
        if skip:
            self.stream.seek(end)
            return b""
        return self.stream.read(count)

    def number(self, form: str) -> Any:
        """The next number; form: of the struct module, least significant byte first."""
        return struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))[0]


# --- safetensors


class _Entry(msgspec.Struct):
    data_offsets: tuple[int, int]


def _safetensors(header: _Header) -> dict[str, Place]:
    entries = msgspec.json.decode(header.take(header.number("Q")), type=dict[str, msgspec.Raw])
    entries.pop("__metadata__", None)
    start = header.stream.tell()
    offsets = {name: msgspec.json.decode(entry, type=_Entry).data_offsets for name, entry in entries.items()}
    return {name: Place(start + first, start + end) for name, (first, end) in offsets.items()}


# --- GGUF


def _gguf(header: _Header) -> dict[str, Place]:
    import gguf  # 2 MiB, which a trainer of safetensors files does without

    if header.take(4) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    if (version := header.number("I")) not in (2, 3):
        raise ValueError(
            f"its version is {version}, but has to be one of (2, 3), least significant byte first"
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
    blocks = {int(kind): size for kind, size in gguf.GGML_QUANT_SIZES.items()}  # values and bytes, by kind
    places = {}
    for _ in range(count):
        name, dimensions = header.take(header.number("Q")).decode(), header.number("I")
        if dimensions > 4:
            raise ValueError(f"{name} has {dimensions} dimensions, but GGUF allows 4")
        shape = tuple(header.number("Q") for _ in range(dimensions))[::-1]
        kind, first = header.number("I"), header.number("Q")
        if kind not in blocks:
            raise ValueError(f"{name} is of kind {kind}, which the installed gguf package does not know")
        size = math.prod(shape) // blocks[kind][0] * blocks[kind][1]
        places[name] = Place(first, first + size, shape, kind)
    start = -(-header.stream.tell() // alignment) * alignment
    return {
        name: place._replace(first=start + place.first, end=start + place.end)
        for name, place in places.items()
    }


def _skip_value(header: _Header, kind: int) -> None:
    count = 1
    if kind == ARRAY:
        kind, count = header.number("I"), header.number("Q")
    if kind == STRING:
        for _ in range(count):  # a wrong count ends at the file's end
            header.take(header.number("Q"), skip=True)
    elif width := VALUE_BYTES.get(kind):
        header.take(count * width, skip=True)
    else:
        raise ValueError(f"a value in its header is of kind {kind}, which GGUF does not have")
