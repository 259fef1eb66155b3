"""Payloads cut into chunks: chunk n begins at byte n * chunk_bytes and has chunk_bytes bytes.

The last chunk may be shorter. On an `up` topic a chunk's index precedes its data, in 4 bytes,
big-endian. Ranges of chunks are [first, last], both included.
"""

import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

from edge_broker.errors import BadMessage
from edge_broker.messages import Artifact, Manifest

# 4 GiB of 64 KiB chunks; bounds what a manifest can make a reader allocate
MAX_CHUNKS = 65_536
_INDEX = struct.Struct(">I")


def adds_up(cut: Manifest | Artifact) -> bool:
    """Whether size, chunk_bytes and chunks agree, within MAX_CHUNKS."""
    return cut.chunks == -(-cut.size // cut.chunk_bytes) and cut.chunks <= MAX_CHUNKS


def size_of(cut: Manifest | Artifact, index: int) -> int:
    """The bytes of one chunk."""
    return min(cut.chunk_bytes, cut.size - index * cut.chunk_bytes)


def read(path: Path, cut: Manifest | Artifact, index: int) -> bytes:
    """One chunk of a whole file; OSError if it cannot be read, or is shorter than it was."""
    with path.open("rb") as file:
        file.seek(index * cut.chunk_bytes)
        data = file.read(size_of(cut, index))
    if len(data) != size_of(cut, index):
        raise OSError(f"{path} is not as long as it was")
    return data


def pack(index: int, data: bytes) -> bytes:
    """The payload on an `up` topic."""
    return _INDEX.pack(index) + data


def unpack(payload: bytes) -> tuple[int, bytes]:
    """The index and the data in a payload of an `up` topic; BadMessage if there is no data."""
    if len(payload) <= _INDEX.size:
        raise BadMessage(f"a chunk of {len(payload)} bytes; it needs 4 of index and at least 1 of data")
    return _INDEX.unpack_from(payload)[0], payload[_INDEX.size :]


def to_ranges(indices: Iterable[int]) -> list[tuple[int, int]]:
    """Ascending chunk numbers as ranges."""
    ranges: list[tuple[int, int]] = []
    for index in indices:
        if ranges and ranges[-1][1] == index - 1:
            ranges[-1] = (ranges[-1][0], index)
        else:
            ranges.append((index, index))
    return ranges


def from_ranges(ranges: Iterable[tuple[int, int]], chunks: int) -> Iterator[int]:
    """The chunk numbers of the ranges, in their order; ranges may repeat each other.

    Raises:
        BadMessage: a range is backwards or reaches past the last chunk.
    """
    for first, last in ranges:
        if not first <= last < chunks:
            raise BadMessage(f"chunks {first} to {last} of {chunks}")
        yield from range(first, last + 1)


class PartialFile:
    """A file whose chunks are written in any order."""

    def __init__(self, path: Path, cut: Manifest | Artifact, written: bytes | None = None) -> None:
        """Go on with a file of which some chunks are written, or begin a file of the full size."""
        self._path, self._cut = path, cut
        self.written = bytearray(written or cut.chunks)  # a byte a chunk: 1 where the file has it
        self.unsynced = 0  # chunks written since the owner last synced the file
        if not written:
            with path.open("wb") as file:
                file.truncate(cut.size)

    def write(self, index: int, data: bytes) -> bool:
        """Write a chunk to its place; False if it was written before.

        Raises:
            BadMessage: there is no such chunk, or it has another size.
            OSError: the disk is full or broken.
        """
        if index >= self._cut.chunks or len(data) != size_of(self._cut, index):
            raise BadMessage(f"chunk {index} of {len(data)} bytes does not fit {self._path.name}")
        if self.written[index]:
            return False
        with self._path.open("r+b") as file:
            file.seek(index * self._cut.chunk_bytes)
            file.write(data)
        self.written[index] = 1
        self.unsynced += 1
        return True

    def missing(self, limit: int) -> list[int]:
        """The first chunks that are not written."""
        indices: list[int] = []
        index = self.written.find(0)
        while index >= 0 and len(indices) < limit:
            indices.append(index)
            index = self.written.find(0, index + 1)
        return indices
