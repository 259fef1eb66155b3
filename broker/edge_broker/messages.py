"""The bodies of the link's messages, in JSON so that `mosquitto_sub -v` shows them.

Unknown fields are ignored, so that a newer sender can talk to an older reader. A wrong type or a
value out of range is a BadMessage. Chunk ranges are [first, last], both included.
"""

import hashlib
import struct
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import msgspec

from edge_broker.errors import BadMessage, BrokerError

Name = Annotated[str, msgspec.Meta(pattern=r"^(?!\.{1,2}\Z)[A-Za-z0-9._-]{1,64}\Z")]
Digest = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
Positive = Annotated[int, msgspec.Meta(ge=1, le=2**53)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Text = Annotated[str, msgspec.Meta(max_length=512)]
Index = Annotated[int, msgspec.Meta(ge=0, lt=10**9)]
Ranges = Annotated[list[tuple[Index, Index]], msgspec.Meta(max_length=10_000)]
T = TypeVar("T")

# 4 GiB of 64 KiB chunks; bounds what a manifest can make a reader allocate
MAX_CHUNKS = 65_536
_CHUNK_INDEX = struct.Struct(">I")


class Presence(msgspec.Struct, frozen=True):
    """The state of a device's connection."""

    state: Literal["online", "offline", "lost"]
    epoch: Count  # grows with every connect, so the highest is the latest


class Artifact(msgspec.Struct, frozen=True):
    """A global adapter's digest and its cut into chunks; small enough for a retained message."""

    digest: Digest  # SHA-256
    size: Positive  # bytes
    chunk_bytes: Positive
    chunks: Positive


class Origin(msgspec.Struct, frozen=True, kw_only=True):
    """Who made an update, in which round, from what; the fields are the manifest's."""

    fleet: str
    device: str
    round: int
    model_class: str
    codec: str
    samples: int
    attempt: int = 1


class Manifest(msgspec.Struct, frozen=True):
    """A device's offer of an update. The digest is signed, so that chunks need no signature."""

    transfer: Name  # random
    fleet: Name
    device: Name
    sequence: Count  # grows with every update of the device; 0 until the outbox assigns it
    round: Count
    model_class: Text
    codec: Text
    sha256: Digest
    size: Positive  # bytes
    chunk_bytes: Positive
    chunks: Positive
    samples: Count  # rows trained on
    attempt: Positive = 1  # trainings of this round on the device, this one included


class Grant(msgspec.Struct, frozen=True, tag_field="type", tag="grant"):
    """The device may send these chunks to this node."""

    transfer: Name
    node: Name
    window: Positive  # chunks without an acknowledgement at a time
    missing: Ranges


class Pause(msgspec.Struct, frozen=True, tag_field="type", tag="pause"):
    """The device shall send nothing for a while, then offer again."""

    transfer: Name
    seconds: Annotated[float, msgspec.Meta(ge=0, le=86_400)]


class Receipt(msgspec.Struct, frozen=True, tag_field="type", tag="receipt"):
    """The update is committed and counts in this round."""

    transfer: Name
    round: Count


class Reject(msgspec.Struct, frozen=True, tag_field="type", tag="reject"):
    """The node refuses the update."""

    transfer: Name
    code: Name
    reason: str
    final: bool  # never offer it again; otherwise offer it later


Inbox = Grant | Pause | Receipt | Reject


class Want(msgspec.Struct, frozen=True):
    """A device asks for these chunks of an artifact."""

    digest: Digest
    missing: Ranges


def encode(message: msgspec.Struct) -> bytes:
    """A message as JSON."""
    return msgspec.json.encode(message)


def decode(body: bytes | str, kind: type[T]) -> T:
    """Read a message of this kind.

    Raises:
        BadMessage: the body is not JSON, or a field is missing, of the wrong type, or out of range.
    """
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadMessage(f"not a {kind.__name__}: {error}") from error


def decode_inbox(body: bytes) -> Inbox:
    """Read a message of a device's inbox.

    Raises:
        BadMessage: as for `decode`.
    """
    try:
        return msgspec.json.decode(body, type=Inbox)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadMessage(f"neither grant, pause, receipt nor reject: {error}") from error


def adds_up(cut: Manifest | Artifact) -> bool:
    """Whether size, chunk_bytes and chunks agree, within MAX_CHUNKS."""
    return cut.chunks == -(-cut.size // cut.chunk_bytes) and cut.chunks <= MAX_CHUNKS


def describe(payload: bytes | Path, origin: Origin, chunk_bytes: int) -> Manifest:
    """The manifest of a payload, with a random transfer name and no sequence number yet.

    Args:
        payload: bytes, or a file, which is read piece by piece.
        origin: who made the payload, from what.
        chunk_bytes: bytes of a chunk.

    Raises:
        BrokerError: the payload is empty.
    """
    sha256, size = digest_and_size(payload)
    return Manifest(
        **msgspec.structs.asdict(origin),
        transfer=uuid.uuid4().hex,
        sequence=0,
        sha256=sha256,
        size=size,
        chunk_bytes=chunk_bytes,
        chunks=-(-size // chunk_bytes),
    )


def digest_and_size(payload: bytes | Path) -> tuple[str, int]:
    """SHA-256 as hex, and the size in bytes.

    Raises:
        BrokerError: the payload is empty.
    """
    digest, size = hashlib.sha256(), 0
    for piece in [payload] if isinstance(payload, bytes) else _pieces(payload):
        digest.update(piece)
        size += len(piece)
    if size == 0:
        name = "the payload" if isinstance(payload, bytes) else payload
        raise BrokerError(f"{name} is empty; there is nothing to send")
    return digest.hexdigest(), size


# --- chunks


def pack_chunk(index: int, data: bytes) -> bytes:
    """The payload on an `up` topic: the chunk's index in 4 bytes, big-endian, then its data."""
    return _CHUNK_INDEX.pack(index) + data


def unpack_chunk(payload: bytes) -> tuple[int, bytes]:
    """The index and the data.

    Raises:
        BadMessage: the payload has no data.
    """
    if len(payload) <= _CHUNK_INDEX.size:
        raise BadMessage(f"a chunk of {len(payload)} bytes; it needs 4 of index and at least 1 of data")
    return _CHUNK_INDEX.unpack_from(payload)[0], payload[_CHUNK_INDEX.size :]


def chunk_size(cut: Manifest | Artifact, index: int) -> int:
    """The bytes in chunk number index: chunk_bytes, or less in the last one."""
    return min(cut.chunk_bytes, cut.size - index * cut.chunk_bytes)


def to_ranges(indices: Iterable[int]) -> list[tuple[int, int]]:
    """Ascending chunk numbers as [first, last] ranges."""
    ranges: list[tuple[int, int]] = []
    for index in indices:
        if ranges and ranges[-1][1] == index - 1:
            ranges[-1] = (ranges[-1][0], index)
        else:
            ranges.append((index, index))
    return ranges


def from_ranges(ranges: Iterable[tuple[int, int]], chunks: int) -> Iterator[int]:
    """The chunk numbers of the ranges, in their order.

    Raises:
        BadMessage: a range is backwards or reaches past the last chunk.
    """
    for first, last in ranges:
        if not first <= last < chunks:
            raise BadMessage(f"chunks {first} to {last} of {chunks}")
        yield from range(first, last + 1)


def _pieces(path: Path, piece_bytes: int = 1 << 20) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(piece_bytes):
            yield piece
