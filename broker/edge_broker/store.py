"""SQLite as the link uses it.

Write-ahead log, synchronous=FULL: after COMMIT the data survives a power cut. Each commit costs one
fsync, and the link commits a few times a transfer, not once a chunk.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def connect(path: Path) -> sqlite3.Connection:
    """Open a database with these settings."""
    path.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(path, isolation_level=None, timeout=10.0)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    return connection


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    """All or nothing; inside another transaction it joins that one."""
    if connection.in_transaction:
        yield connection
        return
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield connection
    except BaseException:
        # SQLite may have undone it itself, as on a full disk
        with suppress(sqlite3.OperationalError):
            connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")
