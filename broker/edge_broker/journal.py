"""The transfers of a node: offered, received, committed or refused.

    open -> committed | rejected           a unique index commits at most once a (device, round)

A transfer's bytes go to one file, each chunk to its place. SQLite records which chunks are written,
sixteen at a time and after the file was synced, so every recorded chunk survives a power cut. The
bytes are no blobs, which would be written twice: to the write-ahead log and to the database.
"""

import sqlite3
from collections.abc import Callable
from pathlib import Path

import msgspec

from edge_broker import files, messages, store
from edge_broker.chunks import PartialFile
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
    code: str  # of a rejected one
    reason: str


class Journal:
    """The transfers of one node."""

    def __init__(self, database: sqlite3.Connection, folder: Path) -> None:
        """Open it.

        Args:
            database: its owner's, from `store.connect`; the tables' names begin with `journal_`.
            folder: the payloads go to its subfolder `journal`, one file a transfer.
        """
        self._database, self._folder = database, folder / "journal"
        self._files: dict[str, PartialFile] = {}
        with store.transaction(database):
            for statement in _TABLES:
                database.execute(statement)
        self._folder.mkdir(parents=True, exist_ok=True)

    # --- asking

    def find(self, transfer: str) -> Entry | None:
        """The journal's entry of a transfer, if there is one."""
        row = self._database.execute(
            "SELECT manifest, state, coalesce(code, ''), coalesce(reason, '') FROM journal_transfer"
            " WHERE transfer = ?",
            (transfer,),
        ).fetchone()
        return Entry(messages.decode(row[0], Manifest), *row[1:]) if row else None

    def sequence(self, device: str) -> int:
        """The highest sequence number seen from a device, or 0."""
        query = "SELECT max(sequence) FROM journal_device WHERE device = ?"
        return int(self._database.execute(query, (device,)).fetchone()[0] or 0)

    def counted(self, device: str, round: int) -> bool:
        """Whether an update of the device is committed in this round."""
        query = "SELECT 1 FROM journal_transfer WHERE device = ? AND round = ? AND state = 'committed'"
        return self._database.execute(query, (device, round)).fetchone() is not None

    def open_transfers(self) -> list[Manifest]:
        """The open transfers, the latest first."""
        return self._manifests("state = 'open' ORDER BY rowid DESC")

    def committed(self, round: int) -> list[Update]:
        """The committed updates of a round in the order of commits; files exist until `release`."""
        manifests = self._manifests("round = ? AND state = 'committed' ORDER BY settled", round)
        return [Update(manifest=manifest, payload=self.payload(manifest.transfer)) for manifest in manifests]

    def payload(self, transfer: str) -> Path:
        """The file of a transfer's bytes."""
        return self._folder / transfer

    def _manifests(self, condition: str, *values: object) -> list[Manifest]:
        rows = self._database.execute(f"SELECT manifest FROM journal_transfer WHERE {condition}", values)
        return [messages.decode(text, Manifest) for (text,) in rows]

    # --- receiving

    def open(self, manifest: Manifest) -> None:
        """Begin to collect a transfer, and remember its sequence number."""
        self._files[manifest.transfer] = PartialFile(self.payload(manifest.transfer), manifest)
        files.sync(self._folder)
        with store.transaction(self._database):
            self._insert(manifest, bytes(manifest.chunks))

    def write(self, manifest: Manifest, index: int, data: bytes) -> bool:
        """Write a chunk of an open transfer as `PartialFile.write` does; record each sixteen."""
        file = self._file(manifest)
        fresh = file.write(index, data)
        if file.unsynced >= _FLUSH_CHUNKS:
            self._flush(manifest)
        return fresh

    def missing(self, manifest: Manifest, limit: int) -> list[int]:
        """The first chunks of an open transfer that are not written yet."""
        return self._file(manifest).missing(limit)

    def verify(self, manifest: Manifest) -> Path:
        """Make a complete transfer durable; BadMessage if its bytes have another digest."""
        self._flush(manifest)
        path = self.payload(manifest.transfer)
        digest, size = messages.digest_and_size(path)
        if (digest, size) != (manifest.sha256, manifest.size):
            raise BadMessage(
                f"the bytes have SHA-256 {digest[:16]}…, the manifest says {manifest.sha256[:16]}…"
            )
        return path

    # --- settling

    def commit(self, transfer: str, within: Callable[[], object] = lambda: None) -> bool:
        """Commit an open transfer; False if it is not open, or the device counts in that round.

        within: makes the caller's changes in the same transaction, if the update counts.
        """
        entry = self.find(transfer)
        if not entry or entry.state != "open" or self.counted(entry.manifest.device, entry.manifest.round):
            return False
        with store.transaction(self._database):
            self._settle(transfer, "committed")
            within()
        return True

    def reject(self, manifest: Manifest, code: str, reason: str) -> None:
        """Refuse a transfer for good, opened or not; a settled transfer stays as it is."""
        entry = self.find(manifest.transfer)
        with store.transaction(self._database):
            if not entry:
                self._insert(manifest, None)  # no byte a chunk: its number of chunks may be absurd
            self._settle(manifest.transfer, "rejected", code, reason)
        if not entry or entry.state != "committed":
            self.payload(manifest.transfer).unlink(missing_ok=True)

    def release(self, round: int) -> None:
        """Delete the files of a round's committed transfers; their entries stay."""
        for update in self.committed(round):
            update.payload.unlink(missing_ok=True)

    def _insert(self, manifest: Manifest, written: bytes | None) -> None:
        text = messages.encode(manifest).decode()
        self._database.execute(
            "INSERT INTO journal_transfer (transfer, device, round, manifest, state, written)"
            " VALUES (?, ?, ?, ?, 'open', ?)",
            (manifest.transfer, manifest.device, manifest.round, text, written),
        )
        self._database.execute(
            "INSERT INTO journal_device VALUES (?, ?)"
            " ON CONFLICT (device) DO UPDATE SET sequence = max(sequence, excluded.sequence)",
            (manifest.device, manifest.sequence),
        )

    def _settle(self, transfer: str, state: str, code: str | None = None, reason: str | None = None) -> None:
        self._database.execute(
            "UPDATE journal_transfer SET state = ?, code = ?, reason = ?, written = NULL,"
            " settled = (SELECT coalesce(max(settled), 0) + 1 FROM journal_transfer)"
            " WHERE transfer = ? AND state = 'open'",
            (state, code, reason, transfer),
        )
        self._files.pop(transfer, None)

    def _flush(self, manifest: Manifest) -> None:
        """Make written chunks of an open transfer durable, then record them."""
        file = self._file(manifest)
        if file.unsynced:
            files.sync(self.payload(manifest.transfer))
            self._record(manifest, file.written)
            file.unsynced = 0

    def _record(self, manifest: Manifest, written: bytes | bytearray) -> None:
        query = "UPDATE journal_transfer SET written = ? WHERE transfer = ?"
        self._database.execute(query, (written, manifest.transfer))

    def _file(self, manifest: Manifest) -> PartialFile:
        """The file of an open transfer, which an earlier process may have begun."""
        if manifest.transfer not in self._files:
            path, written = self.payload(manifest.transfer), None
            if path.exists():
                query = "SELECT written FROM journal_transfer WHERE transfer = ?"
                (written,) = self._database.execute(query, (manifest.transfer,)).fetchone()
            else:
                # the file was lost: the record must not outlive it, and say that the new file is full
                self._record(manifest, bytes(manifest.chunks))
            self._files[manifest.transfer] = PartialFile(path, manifest, written)
        return self._files[manifest.transfer]
