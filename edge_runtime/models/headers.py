"""Where each tensor lies in a weight file, read from the file's header; no weight is read.

    u64 header's length | header: JSON, data_offsets of each tensor | tensors

A file that ends before its tensors do is refused. Damage inside a tensor is not noticed here, but
it gives the checkpoint another digest and so another model class. GGUF files: gguf_header.py.
Source: safetensors' README.
"""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import msgspec

from edge_runtime.errors import InputError
from edge_runtime.models import checkpoint


class Place(NamedTuple):
    """Where a tensor lies in its file."""

    first: int  # byte of the file
    end: int  # byte after the last
    shape: tuple[int, ...] = ()  # as torch has it
    kind: int = 0  # in a GGUF file: gguf.GGMLQuantizationType
    shard: int = 0  # of a GGUF model split over files: the file's number, from 0
    dtype: str = ""  # in a safetensors file, in its words


def files(folder: Path) -> dict[str, Path]:
    """The file that each tensor of a folder is in.

    Raises:
        InputError: two files have a tensor of the same name; or as `checkpoint.weight_files` and
            `tensors` do.
    """
    found: dict[str, Path] = {}
    for path in checkpoint.weight_files(folder):
        for name in tensors(path):
            if name in found:
                raise InputError(
                    f"{found[name]} and {path} both have the tensor {name}: remove the stale file"
                )
            found[name] = path
    return found


def tensors(path: Path) -> dict[str, Place]:
    """The tensors in a .safetensors file by name; raises as `places` does."""
    return places(path, _safetensors)


def places(path: Path, parse: Callable[["HeaderReader"], dict[str, Place]]) -> dict[str, Place]:
    """The tensors that a file's header names, after a check that all lie inside the file.

    Raises:
        InputError: the file is cut short, its header is damaged, or it cannot be read. The message
            names the first tensor outside the file, with bytes seen and needed.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            found = parse(HeaderReader(path, size, stream))
    except (OSError, ValueError) as error:  # msgspec's errors are ValueErrors too
        raise InputError(f"{path} cannot be read: {error}") from error
    needed = max((place.end for place in found.values()), default=0)
    for name, place in sorted(found.items(), key=lambda item: item[1]):
        if place.end > size:
            raise InputError(
                f"{path} is cut short: it has {size} bytes and needs {needed}; the first tensor that is not "
                f"all there is {name}, bytes {place.first} to {place.end}; copy the file again"
            )
    return found


class HeaderReader(NamedTuple):
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
    dtype: str
    shape: tuple[int, ...]


def _safetensors(header: HeaderReader) -> dict[str, Place]:
    entries = msgspec.json.decode(header.take(header.number("Q")), type=dict[str, msgspec.Raw])
    entries.pop("__metadata__", None)
    start, places = header.stream.tell(), {}
    for name, raw in entries.items():
        entry = msgspec.json.decode(raw, type=_Entry)
        first, end = entry.data_offsets
        places[name] = Place(start + first, start + end, entry.shape, dtype=entry.dtype)
    return places
