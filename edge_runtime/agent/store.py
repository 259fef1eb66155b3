"""What an agent keeps over restarts: named values in the SQLite file that it shares with its outbox.

    fleet, id    whose state this is
    node_key     public key of the node that this device has trained for; it follows no other node
    epoch        of the last connection
    round        the last round that this device trained
    rank         to which the method has pruned this device
    report       a report that has not been published yet
    private      the round whose state.bin holds the factors that stay here
    residual     the round whose residual.bin the next delta starts from
    unsent       the round whose payload.bin the node refused; it is added to the next delta
    version_seen the adapter folder as it was when its version was last served and told
    served       the base of that version, for a server that starts before there is a plan

Files are named by their round, so the folder may move.
"""

from pathlib import Path

from edge_runtime.agent.options import DeviceOptions
from edge_runtime.errors import InputError
from edge_runtime.state import database


class DeviceStore:
    """Named values; get and set take part in the transaction that is open on the connection."""

    def __init__(self, path: Path) -> None:
        """Open a file; Path(":memory:") holds values for as long as the object lives."""
        self.connection = database(path)
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

    def claim(self, options: DeviceOptions) -> None:
        """Refuse the state of another device: what it owes is signed for one device of one fleet.

        Raises:
            InputError: the state is another device's, or another fleet's.
        """
        for name, value in (("fleet", options.fleet), ("id", options.id)):
            before = self.get(name)
            if before not in (None, value):
                raise InputError(
                    f"{options.state} is that of {name} `{before}`, not `{value}`: give another --state, or "
                    f"--{name} {before}"
                )
            self.set(name, value)
