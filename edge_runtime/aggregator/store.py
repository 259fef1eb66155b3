"""The node's tables, in one SQLite file that the journal of transfers shares.

rounds     state of each round: collecting, then merged; how often its deadline was extended
versions   global version of each model class after each of the last rounds: master and artifact
shapes     keys and shapes of a class's adapter, from its first accepted updates
devices    public key of each device, pinned when first seen
reports    the last report of each device, round and state
fixed      settings of the fleet file that later rounds build on

Paths are relative to the file's folder, so the folder may move.
"""

from pathlib import Path

import msgspec
from edge_broker import files
from edge_broker.store import transaction

from edge_runtime.protocol.plan import Plan
from edge_runtime.protocol.report import Report
from edge_runtime.state import database

SCHEMA = """
CREATE TABLE IF NOT EXISTS rounds (round INTEGER PRIMARY KEY, state TEXT NOT NULL, extensions INTEGER NOT NULL DEFAULT 0);
CREATE TABLE IF NOT EXISTS versions (model_class TEXT, round INTEGER, master TEXT NOT NULL, artifact TEXT NOT NULL,
    PRIMARY KEY (model_class, round));
CREATE TABLE IF NOT EXISTS shapes (model_class TEXT, key TEXT, shape TEXT NOT NULL, PRIMARY KEY (model_class, key));
CREATE TABLE IF NOT EXISTS devices (id TEXT PRIMARY KEY, key TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS reports (device TEXT, round INTEGER, state TEXT NOT NULL, body BLOB NOT NULL,
    PRIMARY KEY (device, round, state));
CREATE TABLE IF NOT EXISTS fixed (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""


class Version(msgspec.Struct, frozen=True):
    """The files of one class's global version."""

    model_class: str
    master: Path  # float32, the node's own
    artifact: Path  # encoded, for the devices

    @property
    def momenta(self) -> Path:
        """Beside the master, of a fleet with momentum (server_step.py)."""
        return self.master.with_suffix(".momenta")


class NodeStore:
    """The node's tables. Every method takes part in the connection's open transaction, if any."""

    def __init__(self, path: Path) -> None:
        self._folder = path.absolute().parent
        self.connection = database(path)
        self.connection.executescript(SCHEMA)

    def open_round(self) -> int:
        """The round after the last merged round, from 1."""
        row = self.connection.execute("SELECT max(round) FROM rounds WHERE state = 'merged'").fetchone()
        return int(row[0] or 0) + 1

    def fixed(self) -> dict[str, str]:
        """The values that `fix` stored, by name."""
        return dict(self.connection.execute("SELECT name, value FROM fixed").fetchall())

    def fix(self, values: dict[str, str]) -> None:
        """Store values, in place of earlier values of these names."""
        self.connection.executemany("INSERT OR REPLACE INTO fixed VALUES (?, ?)", values.items())

    def extensions(self, round_: int) -> int:
        """How often a round's deadline was extended."""
        row = self.connection.execute("SELECT extensions FROM rounds WHERE round = ?", (round_,)).fetchone()
        return int(row[0]) if row else 0

    def extend(self, round_: int) -> None:
        """Count an extension."""
        self.connection.execute(
            "INSERT INTO rounds VALUES (?, 'collecting', 1)"
            " ON CONFLICT (round) DO UPDATE SET extensions = extensions + 1",
            (round_,),
        )

    def merged(self, round_: int, versions: list[Version]) -> None:
        """Close a round with its global versions, all or nothing."""
        with transaction(self.connection):
            for version in versions:
                paths = [files.movable(path, self._folder) for path in (version.master, version.artifact)]
                query = "INSERT OR REPLACE INTO versions VALUES (?, ?, ?, ?)"
                self.connection.execute(query, (version.model_class, round_, *paths))
            self.connection.execute(
                "INSERT INTO rounds VALUES (?, 'merged', 0) ON CONFLICT (round) DO UPDATE SET state = 'merged'",
                (round_,),
            )

    def versions(self) -> dict[str, Version]:
        """The latest global version of each class."""
        # beside max(), SQLite takes the other columns from the row that has the maximum
        rows = self.connection.execute(
            "SELECT model_class, master, artifact, max(round) FROM versions GROUP BY model_class"
        )
        return {row[0]: Version(row[0], self._folder / row[1], self._folder / row[2]) for row in rows}

    def artifacts(self) -> dict[str, dict[int, Path]]:
        """Each class's published versions that are kept, by the round that they came after."""
        artifacts: dict[str, dict[int, Path]] = {}
        query = "SELECT model_class, round, artifact FROM versions ORDER BY model_class, round"
        for model_class, round_, artifact in self.connection.execute(query):
            artifacts.setdefault(model_class, {})[round_] = self._folder / artifact
        return artifacts

    def plans(self, model_class: str) -> list[Plan]:
        """How devices have trained a class, as they reported."""
        bodies = self.connection.execute("SELECT body FROM reports ORDER BY round").fetchall()
        plans = (msgspec.json.decode(body, type=Report).plan for (body,) in bodies)
        return [plan for plan in plans if plan is not None and plan.model_class == model_class]

    def forget_versions(self, before: int) -> None:
        """Delete versions of earlier rounds, files first, except the latest of each class."""
        older = (
            "FROM versions AS version WHERE round < ? AND round <"
            " (SELECT max(round) FROM versions AS latest WHERE latest.model_class = version.model_class)"
        )
        for name, *paths in self.connection.execute(
            f"SELECT model_class, master, artifact {older}", (before,)
        ).fetchall():
            version = Version(name, *(self._folder / path for path in paths))
            for path in (version.master, version.momenta, version.artifact):
                path.unlink(missing_ok=True)
        self.connection.execute(f"DELETE {older}", (before,))

    def shapes(self, model_class: str) -> dict[str, tuple[int, ...]]:
        """Keys and shapes of a class's adapter."""
        rows = self.connection.execute("SELECT key, shape FROM shapes WHERE model_class = ?", (model_class,))
        return {key: msgspec.json.decode(shape, type=tuple[int, ...]) for key, shape in rows}

    def learn_shapes(self, model_class: str, shapes: dict[str, tuple[int, ...]]) -> None:
        """Store the shapes of an accepted update; a key's first shape stays."""
        self.connection.executemany(
            "INSERT OR IGNORE INTO shapes VALUES (?, ?, ?)",
            [(model_class, key, msgspec.json.encode(shape).decode()) for key, shape in shapes.items()],
        )

    def key(self, device: str) -> str | None:
        """The device's pinned public key."""
        row = self.connection.execute("SELECT key FROM devices WHERE id = ?", (device,)).fetchone()
        return row[0] if row else None

    def add_report(self, report: Report, key: str) -> None:
        """Store a report, and the key that signed it if this is the device's first report.

        The report replaces that of the same round and state. Joining again takes back a failure.
        """
        self.connection.execute("INSERT OR IGNORE INTO devices VALUES (?, ?)", (report.device, key))
        if report.state == "joined":
            query = "DELETE FROM reports WHERE device = ? AND round = ? AND state = 'failed'"
            self.connection.execute(query, (report.device, report.round))
        self.connection.execute(
            "INSERT OR REPLACE INTO reports VALUES (?, ?, ?, ?)",
            (report.device, report.round, report.state, msgspec.json.encode(report)),
        )

    def reported(self, round_: int, state: str) -> set[str]:
        """The devices that reported this state for this round."""
        rows = self.connection.execute(
            "SELECT device FROM reports WHERE round = ? AND state = ?", (round_, state)
        )
        return {row[0] for row in rows}
