"""The four steps of a transfer, offer -> grant -> chunks -> receipt, and fetching a global adapter.

Each machine is driven by its owner's loop, in one thread:

    message = session.receive(timeout_s)
    result = machine.handle(message)      # message may be None
    due_s = machine.tick()                # seconds until the next tick is useful; use it to bound the next receive
"""

import sqlite3
from collections.abc import Callable
from pathlib import Path

import msgspec

from edge_broker.journal import Journal, Update
from edge_broker.messages import Artifact, Manifest
from edge_broker.outbox import Outbox


class Committed(msgspec.Struct, frozen=True):
    """The node counts this update."""

    manifest: Manifest


class Rejected(msgspec.Struct, frozen=True):
    """The node does not take this update; unless final, the uploader offers it again later."""

    manifest: Manifest
    code: str
    reason: str
    final: bool


class Complete(msgspec.Struct, frozen=True):
    """All bytes are here and match the digest: check the content, then `commit` or `reject`."""

    manifest: Manifest
    payload: Path


class Fetched(msgspec.Struct, frozen=True):
    """The artifact is in this file and matches its digest."""

    artifact: Artifact
    path: Path


class Failed(msgspec.Struct, frozen=True):
    """The artifact did not come; the reason is a sentence."""

    artifact: Artifact
    reason: str


class Uploader:
    """A device's side: offers the outbox's oldest update, sends what is granted, settles it with the receipt."""

    def __init__(self, session, outbox: Outbox, fleet: str, device_id: str, key,
                 on_settled: Callable[[Committed | Rejected, sqlite3.Connection], None] | None = None) -> None:
        """on_settled runs inside the transaction that marks the update committed or finally rejected."""

    def start(self) -> None:
        """Subscribe to the device's inbox (after session.connect)."""

    def handle(self, message) -> Committed | Rejected | None: ...
    def tick(self, now: float | None = None) -> float: ...


class Receiver:
    """The node's side: check, grant, collect, hand over for the content check, commit once, answer."""

    def __init__(self, session, journal: Journal, fleet: str, node: str, check: Callable[[Manifest], str | None],
                 known_key: Callable[[str], str | None]) -> None: ...
    def start(self) -> None:
        """Subscribe to offers and to this node's chunks."""
    def handle(self, message) -> Complete | None: ...
    def tick(self, now: float | None = None) -> float: ...
    def commit(self, transfer: str, within: Callable[[sqlite3.Connection], None] | None = None) -> None:
        """Count the update: `within` runs in the same transaction; the receipt goes out after it."""
    def reject(self, transfer: str, reason: str, code: str = "content") -> None:
        """Refuse the update for good, with its reason."""


class Fetcher:
    """A device's side: one artifact at a time, by digest."""

    def __init__(self, session, fleet: str, device_id: str, folder: Path) -> None: ...
    def fetch(self, artifact: Artifact) -> Fetched | None:
        """Begin (Fetched at once if the folder has it)."""
    def handle(self, message) -> Fetched | Failed | None: ...
    def tick(self, now: float | None = None) -> float: ...


class Publisher:
    """The node's side: serves files to all devices that ask at about the same time with one publication."""

    def __init__(self, session, fleet: str) -> None: ...
    def start(self) -> None:
        """Subscribe to the fleet's wants."""
    def serve(self, path: Path, chunk_bytes: int | None = None) -> Artifact:
        """Serve this file from now on; the pointer goes into the round's announcement."""
    def withdraw(self, digest: str) -> None: ...
    def handle(self, message) -> None: ...
    def tick(self, now: float | None = None) -> float: ...
