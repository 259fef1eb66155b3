"""The outside of a payload: its format's name, its table of contents, and its compressed sections.

    payload = b"EDC2" · header length (4 bytes) · zstd(header) · section · section · ...

Nothing is decompressed before its frame says how long it will be, and that this is as long as it
has to be.
"""

import math
from typing import Annotated

import msgspec
import zstandard

from edge_runtime.errors import InputError

MAGIC = b"EDC2"
LARGEST_SIZE = 1 << 31  # values of all tensors together
MOST_STRAYS = 1 << 24  # numbers that are listed beside the digits
LARGEST_ANSWERS_BYTES = 1 << 24
MOST_AXES = 8  # a message that names the shape stays short
LARGEST_HEADER_BYTES = 1 << 23  # decompressed; 100 layers take 0.1 MB, and the most labels 2 MB
SECTIONS = 6  # as codec.py has them
# JSON has whole numbers of any length, of which Python prints 4,300 digits at most
Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


class Header(msgspec.Struct, frozen=True, omit_defaults=True):
    """The payload's table of contents."""

    shapes: dict[str, tuple[int, ...]]  # by key, in the order in which the values follow
    sections: tuple[Count, ...] = ()  # compressed bytes of each section
    strays: Count = 0
    completions_bytes: Count = 0  # of the answers, which are completions in every method so far
    rank: Count = 0  # of a device that trained some tensors in part, as this rank has it; 0: in whole


def assemble(header: Header, sections: list[bytes]) -> bytes:
    """A payload of compressed sections, whose lengths are put into the header."""
    complete = msgspec.structs.replace(header, sections=tuple(map(len, sections)))
    encoded = compress(msgspec.json.encode(complete))
    return b"".join([MAGIC, len(encoded).to_bytes(4, "big"), encoded, *sections])


def compress(content: bytes) -> bytes:
    """A section; no bytes for none."""
    return zstandard.ZstdCompressor(level=3).compress(content) if content else b""


def read(payload: bytes) -> tuple[Header, list[bytes]]:
    """The header, and the compressed sections; raises InputError where the payload is malformed."""
    header, begin = header_of(payload)
    if len(header.sections) != SECTIONS:
        raise InputError(f"the payload declares {len(header.sections)} sections, not {SECTIONS}")
    if sum(header.sections) != len(payload) - begin:
        raise InputError(
            f"the payload has {len(payload) - begin} bytes of sections, its header needs {sum(header.sections)}"
        )
    sections = []
    for length in header.sections:
        sections.append(payload[begin : begin + length])
        begin += length
    return header, sections


def expand(section: bytes, expected: int) -> bytes:
    """Decompress a section; raises InputError unless it has the expected length."""
    if not expected and not section:
        return b""
    try:
        declared = zstandard.frame_content_size(section)
        if declared != expected:
            raise InputError(f"the payload holds {declared} bytes of values, its header needs {expected}")
        return zstandard.ZstdDecompressor().decompress(section, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise InputError(f"the payload cannot be decompressed: {error}") from error


def header_of(payload: bytes) -> tuple[Header, int]:
    """The header, and the offset of the first section; raises InputError where it cannot be read."""
    if payload[:3] == MAGIC[:3] and payload[:4] != MAGIC:
        raise InputError(
            f"the payload is in format {payload[:4]!r} of another version of Edge Runtime, and this one reads "
            f"{MAGIC!r}: give node and devices the same version, and start anew with another --state"
        )
    if payload[:4] != MAGIC or len(payload) < 8:
        raise InputError("the payload is no encoded adapter state")
    split = 8 + int.from_bytes(payload[4:8], "big")
    if split > len(payload):
        raise InputError(
            f"the payload's header cannot be read: it claims {split - 8} bytes of {len(payload)}"
        )
    section = payload[8:split]
    try:
        declared = zstandard.frame_content_size(section)
        if not 0 < declared <= LARGEST_HEADER_BYTES:
            raise InputError(f"the payload's header cannot be read: it claims to be {declared} bytes long")
        header = msgspec.json.decode(expand(section, declared), type=Header)
    except (zstandard.ZstdError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"the payload's header cannot be read: {error}") from error
    _check(header)
    return header, split


def _check(header: Header) -> None:
    """Refuse sizes that no payload has."""
    if any(len(shape) > MOST_AXES for shape in header.shapes.values()):
        raise InputError(f"the payload declares a tensor of more than {MOST_AXES} axes")
    if any(dimension < 1 for shape in header.shapes.values() for dimension in shape):
        raise InputError("the payload declares an empty tensor")
    total = sum(map(math.prod, header.shapes.values()))
    if total > LARGEST_SIZE:
        raise InputError(f"the payload declares more than {LARGEST_SIZE} values")
    if header.strays > min(total, MOST_STRAYS):
        raise InputError(f"the payload declares {header.strays} strays in {total} values")
    if header.completions_bytes > LARGEST_ANSWERS_BYTES:
        raise InputError(f"the payload declares {header.completions_bytes} bytes of completions")
