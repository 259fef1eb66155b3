"""The bodies of the link's messages, in JSON so that `mosquitto_sub -v` shows them.

Unknown fields are ignored, so that a newer sender can talk to an older reader. A wrong type or a
value out of range is a BadMessage.
"""

import hashlib
import uuid
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import msgspec

from edge_broker import topics
from edge_broker.errors import BadMessage, BrokerError

Name = Annotated[str, msgspec.Meta(pattern=rf"^{topics.NAME}\Z")]
Digest = Annotated[str, msgspec.Meta(pattern=rf"^{topics.DIGEST}\Z")]
Positive = Annotated[int, msgspec.Meta(ge=1, le=2**53)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Text = Annotated[str, msgspec.Meta(max_length=512)]
Index = Annotated[int, msgspec.Meta(ge=0, lt=10**9)]
Ranges = Annotated[list[tuple[Index, Index]], msgspec.Meta(max_length=10_000)]
T = TypeVar("T")


class Presence(msgspec.Struct, frozen=True):
    """The state of a device's connection."""

    state: Literal["online", "offline", "lost"]
    epoch: Count  # grows with every connect, so the highest is the latest
    process: Name = "unknown"  # random, another one for each start of the agent


class Artifact(msgspec.Struct, frozen=True):
    """A global adapter's digest and its cut into chunks; small enough for a retained message."""

    digest: Digest  # SHA-256
    size: Positive  # bytes
    chunk_bytes: Positive
    chunks: Positive


class Origin(msgspec.Struct, frozen=True, kw_only=True):
    """Who made an update, in which round, from what."""

    fleet: Name
    device: Name
    round: Count
    model_class: Text
    codec: Text
    samples: Count  # rows trained on
    attempt: Positive = 1  # trainings of this round on the device, this one included


class Manifest(Origin, frozen=True, kw_only=True):
    """A device's offer of an update. The digest is signed, so that chunks need no signature."""

    transfer: Name  # random
    sequence: Count  # grows with every update of the device; 0 until the outbox assigns it
    sha256: Digest
    size: Positive  # bytes
    chunk_bytes: Positive
    chunks: Positive


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


def decode(body: bytes | str, kind: type[T], name: str = "") -> T:
    """Read a message of this kind. name: of the kind, for the error; by default its class.

    Raises:
        BadMessage: the body is not JSON, or a field is missing, of the wrong type, or out of range.
    """
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadMessage(f"not a {name or kind.__name__}: {error}") from error


def decode_inbox(body: bytes) -> Inbox:
    """Read a message of a device's inbox. Raises as `decode` does."""
    try:
        return msgspec.json.decode(body, type=Inbox)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadMessage(f"neither grant, pause, receipt nor reject: {error}") from error


def describe(payload: Path, origin: Origin, chunk_bytes: int) -> Manifest:
    """The manifest of a file, with a random transfer name and no sequence number yet."""
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


def recut(manifest: Manifest, chunk_bytes: int) -> Manifest:
    """The same update in other chunks, as a transfer of its own without a sequence number yet."""
    cut = {"chunk_bytes": chunk_bytes, "chunks": -(-manifest.size // chunk_bytes)}
    return msgspec.structs.replace(manifest, transfer=uuid.uuid4().hex, sequence=0, **cut)


def digest_and_size(path: Path) -> tuple[str, int]:
    """SHA-256 of a file as hex, and its size in bytes.

    Raises:
        BrokerError: the file is empty.
    """
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
            size += len(piece)
    if size == 0:
        raise BrokerError(f"{path} is empty; there is nothing to send")
    return digest.hexdigest(), size
