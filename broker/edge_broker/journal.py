"""What a node has been offered, has received and has committed (signatures first; the bodies follow)."""

import sqlite3
from contextlib import AbstractContextManager
from pathlib import Path

import msgspec

from edge_broker.messages import Manifest


class Update(msgspec.Struct, frozen=True):
    """A transfer whose bytes are all here and match its digest."""

    manifest: Manifest
    payload: Path


class Journal:
    """The transfers of one node, in SQLite (tables `journal_*`) and one file a transfer."""

    def __init__(self, database: sqlite3.Connection | Path, folder: Path) -> None:
        """database: an open connection (shared with the caller's own tables) or a file; folder: where payloads are kept."""

    def transaction(self) -> AbstractContextManager[sqlite3.Connection]:
        """One SQLite transaction; inside another one it joins that."""
        raise NotImplementedError

    def committed(self, round: int) -> list[Update]:
        """What counts in a round, in the order of commits; a payload exists until `release`."""
        raise NotImplementedError

    def release(self, round: int) -> None:
        """Delete the payload files of a round; the receipts stay."""
        raise NotImplementedError
