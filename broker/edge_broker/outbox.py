"""What a device still owes the node (signatures first; the bodies follow)."""

import sqlite3
from contextlib import AbstractContextManager
from pathlib import Path

from edge_broker.messages import Manifest


class Outbox:
    """The updates of one device, in SQLite (tables `outbox_*`)."""

    def __init__(self, database: sqlite3.Connection | Path, folder: Path) -> None:
        """database: an open connection (shared with the caller's own tables) or a file; folder: where payloads given as bytes are kept."""

    def transaction(self) -> AbstractContextManager[sqlite3.Connection]:
        """One SQLite transaction; inside another one it joins that."""
        raise NotImplementedError

    def add(self, manifest: Manifest, payload: bytes | Path) -> Manifest:
        """Keep an update until its receipt; returns the manifest with its sequence number. A Path is read in place, never moved or deleted."""
        raise NotImplementedError

    def pending(self) -> list[Manifest]:
        """What waits for a receipt, oldest first."""
        raise NotImplementedError

    def payload(self, transfer: str) -> Path:
        """The file with the transfer's bytes."""
        raise NotImplementedError

    def commit(self, transfer: str) -> None:
        """The receipt came."""
        raise NotImplementedError

    def reject(self, transfer: str, code: str, reason: str) -> None:
        """A final rejection came."""
        raise NotImplementedError

    def state(self, transfer: str) -> str | None:
        """pending, committed, rejected, or None."""
        raise NotImplementedError
