"""The transfers of a node: offered, received, committed or refused.

    open -> committed | rejected           a unique index commits at most once a (device, round)

A transfer's bytes go to one file, each chunk to its place. SQLite records which chunks are written,
sixteen at a time and after the file was synced, so every recorded chunk survives a power cut. The
bytes are no blobs, which would be written twice: to the write-ahead log and to the database.
"""

import os
import sqlite3
from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path

import msgspec

from edge_broker import files, messages, store
from edge_broker.errors import BadMessage
from edge_broker.messages import Manifest

_FLUSH_CHUNKS = 16

_TABLES = (
    """CREATE TABLE IF NOT EXISTS journal_transfer (
        transfer TEXT PRIMARY KEY, device TEXT NOT NULL, round INTEGER NOT NULL, manifest TEXT NOT NULL,
        state TEXT NOT NULL, written BLOB, code TEXT, reason TEXT, settled INTEGER)""",
    """CREATE UNIQUE INDEX IF NOT EXISTS journal_counted ON journal_transfer (round, device)
        WHERE state = 'committed'""",
    "CREATE INDEX IF NOT EXISTS journal_settled ON journal_transfer (settled)",
    "CREATE INDEX IF NOT EXISTS journal_open ON journal_transfer (state) WHERE state = 'open'",
    "CREATE TABLE IF NOT EXISTS journal_device (device TEXT PRIMARY KEY, sequence INTEGER NOT NULL)",
)


class Update(msgspec.Struct, frozen=True):
    """A complete transfer whose bytes match its digest."""

    manifest: Manifest
    payload: Path


class Entry(msgspec.Struct, frozen=True):
    """A transfer as the journal has it."""

    manifest: Manifest
    state: str  # open, committed or rejected
    code: str | None  # of a rejected one
    reason: str | None


class Journal:
    """The transfers of one node."""

    def __init__(self, database: sqlite3.Connection | Path, folder: Path) -> None:
        """Open it.

        Args:
            database: a file, or an open connection; the tables' names begin with `journal_`.
            folder: the payloads go to its subfolder `journal`, one file a transfer.
        """
        self._database, self._folder = store.connect(database), folder / "journal"
        self._written: dict[str, bytearray] = {}  # a byte a chunk, 1 where it is in the file
        self._unflushed: dict[str, int] = {}
        with store.transaction(self._database):
            for statement in _TABLES:
                self._database.execute(statement)
        self._folder.mkdir(parents=True, exist_ok=True)

    def transaction(self) -> AbstractContextManager[sqlite3.Connection]:
        """One transaction for changes here and of the caller; joins a transaction that is open."""
        return store.transaction(self._database)

    @property
    def in_transaction(self) -> bool:
        """Whether a transaction is open, so that the last change may still be undone."""
        return self._database.in_transaction

    # --- asking

    def find(self, transfer: str) -> Entry | None:
        """The journal's entry of a transfer, if there is one."""
        query = "SELECT manifest, state, code, reason FROM journal_transfer WHERE transfer = ?"
        row = self._database.execute(query, (transfer,)).fetchone()
        return Entry(messages.decode(row[0], Manifest), *row[1:]) if row else None

    def sequence(self, device: str) -> int:
        """The highest sequence number seen from a device, or 0."""
        row = self._database.execute(
            "SELECT sequence FROM journal_device WHERE device = ?", (device,)
        ).fetchone()
        return row[0] if row else 0

    def counted(self, device: str, round: int) -> str | None:
        """The transfer committed for a device in a round, if there is one."""
        query = "SELECT transfer FROM journal_transfer WHERE device = ? AND round = ? AND state = 'committed'"
        row = self._database.execute(query, (device, round)).fetchone()
        return row[0] if row else None

    def open_transfers(self, limit: int = -1) -> list[Manifest]:
        """The open transfers, the latest first."""
        query = "SELECT manifest FROM journal_transfer WHERE state = 'open' ORDER BY rowid DESC LIMIT ?"
        return [messages.decode(text, Manifest) for (text,) in self._database.execute(query, (limit,))]

    def committed(self, round: int) -> list[Update]:
        """The committed updates of a round in the order of commits; files exist until `release`."""
        query = (
            "SELECT manifest FROM journal_transfer WHERE round = ? AND state = 'committed' ORDER BY settled"
        )
        manifests = [messages.decode(text, Manifest) for (text,) in self._database.execute(query, (round,))]
        return [Update(manifest=manifest, payload=self.payload(manifest.transfer)) for manifest in manifests]

    def payload(self, transfer: str) -> Path:
        """The file of a transfer's bytes."""
        return self._folder / transfer

    # --- receiving

    def open(self, manifest: Manifest) -> None:
        """Begin to collect a transfer, and remember its sequence number."""
        with self.payload(manifest.transfer).open("wb") as file:
            file.truncate(manifest.size)
        files.sync(self._folder)
        with self.transaction():
            self._insert(manifest, "open", bytes(manifest.chunks), None, None)

    def write(self, manifest: Manifest, index: int, data: bytes) -> bool:
        """Write a chunk of an open transfer to its place; False if it was written before.

        Raises:
            BadMessage: the transfer has no such chunk, or the chunk has another size.
            OSError: the disk is full or broken.
        """
        if index >= manifest.chunks or len(data) != messages.chunk_size(manifest, index):
            raise BadMessage(f"chunk {index} of {len(data)} bytes does not fit transfer {manifest.transfer}")
        written = self._load(manifest)
        if written[index]:
            return False
        file = os.open(self.payload(manifest.transfer), os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            # pwrite may write less than all
            offset = 0
            while offset < len(data):
                offset += os.pwrite(file, data[offset:], index * manifest.chunk_bytes + offset)
        finally:
            os.close(file)
        written[index] = 1
        self._unflushed[manifest.transfer] = self._unflushed.get(manifest.transfer, 0) + 1
        if self._unflushed[manifest.transfer] >= _FLUSH_CHUNKS:
            self.flush(manifest.transfer)
        return True

    def missing(self, manifest: Manifest, limit: int) -> list[int]:
        """The first chunks of an open transfer that are not written yet."""
        written = self._load(manifest)
        return list(islice((index for index, flag in enumerate(written) if not flag), limit))

    def flush(self, transfer: str | None = None) -> None:
        """Make written chunks durable and record them, for one transfer or all."""
        for name in [transfer] if transfer else list(self._unflushed):
            if self._unflushed.get(name):
                files.sync(self.payload(name))
                with self.transaction() as database:
                    database.execute(
                        "UPDATE journal_transfer SET written = ? WHERE transfer = ?",
                        (self._written[name], name),
                    )
                del self._unflushed[name]

    def verify(self, manifest: Manifest) -> Path:
        """Make a complete transfer durable and compare its bytes with the manifest's digest.

        Raises:
            BadMessage: the bytes have another digest.
        """
        self.flush(manifest.transfer)
        path = self.payload(manifest.transfer)
        digest, size = messages.digest_and_size(path)
        if (digest, size) != (manifest.sha256, manifest.size):
            raise BadMessage(
                f"the bytes have SHA-256 {digest[:16]}…, the manifest says {manifest.sha256[:16]}…"
            )
        return path

    # --- settling

    def commit(self, transfer: str) -> bool:
        """Commit an open transfer; False if it is not open, or the device counts in that round."""
        entry = self.find(transfer)
        if not entry or entry.state != "open" or self.counted(entry.manifest.device, entry.manifest.round):
            return False
        with self.transaction():
            self._settle(transfer, "committed", None, None)
        return True

    def reject(self, manifest: Manifest, code: str, reason: str) -> None:
        """Refuse a transfer for good, opened or not; a settled transfer stays as it is."""
        with self.transaction():
            if not self.find(manifest.transfer):
                self._insert(manifest, "rejected", None, code, reason)
            else:
                self._settle(manifest.transfer, "rejected", code, reason)
        self.tidy(manifest.transfer)

    def tidy(self, transfer: str) -> None:
        """Delete a refused transfer's file, unless a transaction is open, which may be undone."""
        if not self.in_transaction and (entry := self.find(transfer)) and entry.state == "rejected":
            self.payload(transfer).unlink(missing_ok=True)

    def release(self, round: int) -> None:
        """Delete the files of a round's committed transfers; their entries stay."""
        for update in self.committed(round):
            update.payload.unlink(missing_ok=True)

    def _insert(
        self, manifest: Manifest, state: str, written: bytes | None, code: str | None, reason: str | None
    ) -> None:
        text = messages.encode(manifest).decode()
        self._database.execute(
            "INSERT INTO journal_transfer (transfer, device, round, manifest, state, written, code, reason)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (manifest.transfer, manifest.device, manifest.round, text, state, written, code, reason),
        )
        self._database.execute(
            "INSERT INTO journal_device VALUES (?, ?)"
            " ON CONFLICT (device) DO UPDATE SET sequence = max(sequence, excluded.sequence)",
            (manifest.device, manifest.sequence),
        )

    def _settle(self, transfer: str, state: str, code: str | None, reason: str | None) -> None:
        self._database.execute(
            "UPDATE journal_transfer SET state = ?, code = ?, reason = ?, written = NULL,"
            " settled = (SELECT coalesce(max(settled), 0) + 1 FROM journal_transfer)"
            " WHERE transfer = ? AND state = 'open'",
            (state, code, reason, transfer),
        )
        self._written.pop(transfer, None)
        self._unflushed.pop(transfer, None)

    def _load(self, manifest: Manifest) -> bytearray:
        written = self._written.get(manifest.transfer)
        if written is None:
            query = "SELECT written FROM journal_transfer WHERE transfer = ? AND state = 'open'"
            row = self._database.execute(query, (manifest.transfer,)).fetchone()
            # without its file, nothing of the transfer is written, whatever the record says
            exists = row and self.payload(manifest.transfer).exists()
            written = self._written[manifest.transfer] = bytearray(row[0] if exists else manifest.chunks)
        return written
