"""The updates that a device owes the node, in SQLite until their receipt or final rejection.

    pending -> committed | rejected

The outbox assigns the sequence numbers. They only grow and start no lower than the clock (ms), so
that a device that lost its state is not taken for a replay. Payloads stay files, because SQLite
reads a blob from its beginning, and a chunk is read alone.
"""

import sqlite3
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Literal

import msgspec

from edge_broker import files, messages, store
from edge_broker.errors import BrokerError
from edge_broker.messages import Manifest

_TABLES = (
    """CREATE TABLE IF NOT EXISTS outbox_update (
        sequence INTEGER PRIMARY KEY, transfer TEXT NOT NULL UNIQUE, manifest TEXT NOT NULL, payload TEXT NOT NULL,
        state TEXT NOT NULL DEFAULT 'pending', code TEXT, reason TEXT)""",
    "CREATE INDEX IF NOT EXISTS outbox_pending ON outbox_update (sequence) WHERE state = 'pending'",
    "CREATE TABLE IF NOT EXISTS outbox_sequence (one INTEGER PRIMARY KEY CHECK (one = 1), last INTEGER NOT NULL)",
    "INSERT OR IGNORE INTO outbox_sequence VALUES (1, 0)",
)


class Outbox:
    """The updates of one device."""

    def __init__(self, database: sqlite3.Connection, folder: Path) -> None:
        """Open it.

        Args:
            database: its owner's, from `store.connect`; the tables' names begin with `outbox_`.
            folder: payloads inside it are found again after it has moved.
        """
        self._database, self._folder = database, folder
        with store.transaction(database):
            for statement in _TABLES:
                database.execute(statement)

    def transaction(self) -> AbstractContextManager[sqlite3.Connection]:
        """One transaction for changes here and of the caller; joins a transaction that is open."""
        return store.transaction(self._database)

    def add(self, manifest: Manifest, payload: Path) -> Manifest:
        """Store an update until its receipt. The payload's file must stay unchanged until then.

        manifest is from `messages.describe`. Returns the manifest with its sequence number. Raises
        BrokerError where the file's size is not the manifest's, or the transfer is stored already.
        """
        if (size := payload.stat().st_size) != manifest.size:
            raise BrokerError(
                f"{payload} has {size} bytes, its manifest says {manifest.size}; describe it again"
            )
        with self.transaction() as database:
            (last,) = database.execute("SELECT last FROM outbox_sequence").fetchone()
            sequence = max(last, time.time_ns() // 1_000_000) + 1
            database.execute("UPDATE outbox_sequence SET last = ?", (sequence,))
            manifest = msgspec.structs.replace(manifest, sequence=sequence)
            text, place = messages.encode(manifest).decode(), files.movable(payload, self._folder)
            try:
                database.execute(
                    "INSERT INTO outbox_update (sequence, transfer, manifest, payload) VALUES (?, ?, ?, ?)",
                    (sequence, manifest.transfer, text, place),
                )
            except sqlite3.IntegrityError:
                raise BrokerError(f"transfer {manifest.transfer} is already in the outbox") from None
        return manifest

    def recut(self, manifest: Manifest, chunk_bytes: int) -> Manifest:
        """Replace a pending update by itself in other chunks, which comes last in the sequence."""
        with self.transaction():
            self.settle(manifest.transfer, "rejected", "recut")
            return self.add(messages.recut(manifest, chunk_bytes), self.payload(manifest.transfer))

    def pending(self, limit: int = -1) -> list[Manifest]:
        """The manifests that wait for a receipt, the oldest first."""
        rows = self._database.execute(
            "SELECT manifest FROM outbox_update WHERE state = 'pending' ORDER BY sequence LIMIT ?", (limit,)
        )
        return [messages.decode(text, Manifest) for (text,) in rows]

    def payload(self, transfer: str) -> Path:
        """The file with an update's bytes; BrokerError if there is no such update."""
        query = "SELECT payload FROM outbox_update WHERE transfer = ?"
        row = self._database.execute(query, (transfer,)).fetchone()
        if not row:
            raise BrokerError(f"transfer {transfer} is not in the outbox")
        return self._folder.absolute() / str(row[0])

    def settle(
        self, transfer: str, state: Literal["committed", "rejected"], code: str = "", reason: str = ""
    ) -> None:
        """Take the node's final word on a pending update; any other update stays as it is."""
        self._database.execute(
            "UPDATE outbox_update SET state = ?, code = ?, reason = ? WHERE transfer = ? AND state = 'pending'",
            (state, code or None, reason or None, transfer),
        )
