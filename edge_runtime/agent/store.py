"""What an agent must not forget: a few named values in the SQLite file it shares with its outbox.

    fleet, id    whose state this is
    node_key     public key of the node that this device has trained for: no other one is followed from then on
    epoch        of the last connection
    round        the last round this device trained
    rank         to which the method has pruned this device
    report       a report that has not been published yet
    private      the round whose state.bin holds the factors that stay here
    residual     the round whose residual.bin the next delta starts from
    unsent       the round whose payload.bin the node refused: it counts into the next delta

Files are named by their round, so the folder may move.
"""

import sqlite3
from pathlib import Path


class Store:
    """Named values; set and get take part in whatever transaction is open on the connection."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.connection = sqlite3.connect(path, isolation_level=None)
        self.connection.execute("PRAGMA journal_mode = WAL")
        self.connection.execute("PRAGMA synchronous = FULL")
        self.connection.execute(
            "CREATE TABLE IF NOT EXISTS state (name TEXT PRIMARY KEY, value TEXT NOT NULL)"
        )

    def get(self, name: str) -> str | None:
        """The value, or None."""
        row = self.connection.execute("SELECT value FROM state WHERE name = ?", (name,)).fetchone()
        return row[0] if row else None

    def set(self, name: str, value: str | None) -> None:
        """Keep a value; None forgets it."""
        if value is None:
            self.connection.execute("DELETE FROM state WHERE name = ?", (name,))
        else:
            self.connection.execute("INSERT OR REPLACE INTO state VALUES (?, ?)", (name, value))
