"""The node's tables, in one SQLite file that the journal of transfers shares.

rounds     state of each round: collecting, then merged; how often its deadline was extended
versions   global version of each model class after each of the last rounds: master, artifact, and
           how many artifacts its chain has with this one (adapters/versions.py)
shapes     keys and shapes of a class's adapter, from its first accepted updates
devices    public key of each device, pinned when first seen
reports    the last report of each device, round and state
fixed      settings of the fleet file that later rounds build on

Paths are relative to the file's folder, so the folder may move.
"""

from bisect import bisect_left
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
    links INTEGER NOT NULL,    PRIMARY KEY (model_class, round));
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
    chain: tuple[Path, ...]  # encoded artifacts, for the devices; the last is this version's own

    @property
    def artifact(self) -> Path:
        """What this version adds to its chain."""
        return self.chain[-1]

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
                query = "INSERT OR REPLACE INTO versions VALUES (?, ?, ?, ?, ?)"
                self.connection.execute(query, (version.model_class, round_, *paths, len(version.chain)))
            self.connection.execute(
                "INSERT INTO rounds VALUES (?, 'merged', 0) ON CONFLICT (round) DO UPDATE SET state = 'merged'",
                (round_,),
            )

    def versions(self) -> dict[str, Version]:
        """The latest global version of each class."""
        return {name: [*versions.values()][-1] for name, versions in self.kept_versions().items()}

    def kept_versions(self) -> dict[str, dict[int, Version]]:
        """Each class's versions that are kept, by the round that they came after."""
        kept: dict[str, dict[int, Version]] = {}
        artifacts: dict[str, list[Path]] = {}
        query = "SELECT model_class, round, master, artifact, links FROM versions ORDER BY model_class, round"
        for name, round_, master, artifact, links in self.connection.execute(query):
            own = artifacts.setdefault(name, [])
            own.append(self._folder / artifact)
            kept.setdefault(name, {})[round_] = Version(name, self._folder / master, tuple(own[-links:]))
        return kept

    def plans(self, model_class: str) -> list[Plan]:
        """How devices have trained a class, as they reported."""
        bodies = self.connection.execute("SELECT body FROM reports ORDER BY round").fetchall()
        plans = (msgspec.json.decode(body, type=Report).plan for (body,) in bodies)
        return [plan for plan in plans if plan is not None and plan.model_class == model_class]

    def forget_versions(self, before: int) -> None:
        """Delete versions of earlier rounds, files first.

        Except the latest of each class, and those that begin the chain of a version that stays.
        """
        for name, versions in self.kept_versions().items():
            rounds = [*versions]
            oldest = min(bisect_left(rounds, before), len(rounds) - 1)  # of those that stay for themselves
            first = oldest + 1 - len(versions[rounds[oldest]].chain)
            for round_ in rounds[:first]:
                version = versions[round_]
                for path in (version.master, version.momenta, version.artifact):
                    path.unlink(missing_ok=True)
            query = "DELETE FROM versions WHERE model_class = ? AND round < ?"
            self.connection.execute(query, (name, rounds[first]))

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
