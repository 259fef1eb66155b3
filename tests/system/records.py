"""What a fleet left behind, in the files of its node and its devices and on the broker."""

import contextlib
import json
import sqlite3
import threading
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import zstandard
from edge_broker import presence, topics
from edge_broker.chunks import unpack
from edge_broker.session import Message, Session
from fleet import Fleet
from safetensors.numpy import load_file

from edge_runtime.adapters.initial import initial
from edge_runtime.adapters.versions import published
from edge_runtime.aggregator.store import NodeStore
from edge_runtime.methods import fedit
from edge_runtime.protocol import codec
from edge_runtime.protocol.report import Report


def committed(fleet: Fleet) -> list[tuple[str, int]]:
    """Device and round of every update that counts."""
    with contextlib.closing(sqlite3.connect(fleet.folder / "node" / "node.db")) as database:
        rows = database.execute(
            "SELECT device, round FROM journal_transfer WHERE state = 'committed' ORDER BY 1, 2"
        )
        return rows.fetchall()


def reports(fleet: Fleet, state: str) -> dict[tuple[str, int], Report]:
    """The node's reports of this state, by device and round."""
    with contextlib.closing(NodeStore(fleet.folder / "node" / "node.db").connection) as database:
        rows = database.execute(
            "SELECT device, round, body FROM reports WHERE state = ?", (state,)
        ).fetchall()
    return {(device, round_): msgspec.json.decode(body, type=Report) for device, round_, body in rows}


def master(fleet: Fleet, round_: int) -> dict[str, np.ndarray]:
    """The float32 version of the only model class after a round, with what the fleet shares."""
    of_class, *shared = (fleet.folder / "node" / "versions").glob(f"{round_:05d}-*.safetensors")
    assert len(shared) <= 1
    return {key: value for path in (of_class, *shared) for key, value in load_file(path).items()}


def version_0(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """What a factor of a fleet with fedit and seed 0 starts from."""
    return initial(key, shape, 0, fedit.METHOD.factors[key[-1]])


def version(*chain: Path) -> dict[str, np.ndarray]:
    """What devices of a fleet with fedit and seed 0 start from, with a chain of these artifacts."""
    return published(chain, 0, fedit.METHOD)


def sent(fleet: Fleet, device: str, round_: int, work: str = "work") -> dict[str, np.ndarray]:
    """The delta a device sent, as the node decoded it; work is the folder of its rounds."""
    return codec.decode((fleet.folder / device / work / f"round-{round_}" / "payload.bin").read_bytes())


def job(fleet: Fleet, device: str, round_: int) -> dict[str, Any]:
    """The job a device gave its trainer."""
    contents: dict[str, Any] = json.loads(
        (fleet.folder / device / "work" / f"round-{round_}" / "job.json").read_text()
    )
    return contents


def remembered(fleet: Fleet, device: str) -> dict[str, str]:
    """The named values of a device's agent."""
    with contextlib.closing(sqlite3.connect(fleet.folder / device / "agent.db")) as database:
        return dict(database.execute("SELECT name, value FROM state").fetchall())


def owes(fleet: Fleet, device: str) -> bool:
    """Whether the device's agent has an update that the node has not answered."""
    with contextlib.closing(sqlite3.connect(fleet.folder / device / "agent.db")) as database:
        query = "SELECT count(*) FROM outbox_update WHERE state = 'pending'"
        return bool(database.execute(query).fetchone()[0])


def await_round(fleet: Fleet) -> None:
    """Wait until the broker keeps a round for those who come later."""
    with Session(fleet.broker.url, f"{fleet.name}-waits", session_expiry_s=0) as session:
        session.connect(10)
        session.subscribe(topics.round(fleet.name))
        while not isinstance(item := session.receive(10), Message):
            assert item is not None


def presence_of(fleet: Fleet, device: str) -> str:
    """A device's presence, as the broker keeps it."""
    tracker = presence.Tracker()
    with Session(fleet.broker.url, f"{fleet.name}-looks", session_expiry_s=0) as session:
        session.connect(10)
        session.subscribe(topics.presence(fleet.name, topics.ANY))
        while tracker.state(device) == "unknown":
            item = session.receive(5)
            assert item is not None
            if isinstance(item, Message):
                tracker.handle(item.topic, item.payload)
    return tracker.state(device)


ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


class Recorder:
    """Keeps every message that crosses a broker while it runs."""

    def __init__(self, session: Session) -> None:
        self._session, self._ending = session, threading.Event()
        self.messages: list[Message] = []
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while (item := self._session.receive(0.5)) is not None or not self._ending.is_set():
            if isinstance(item, Message):
                self.messages.append(item)

    def end(self) -> None:
        """Take what has still to come, and stop; may be called again."""
        self._ending.set()
        self._thread.join(30)

    def searchable(self) -> str:
        """Topics and bodies as text, with each transfer's chunks put together and decompressed."""
        self.end()
        parts, chunks = [], defaultdict[str, dict[int, bytes]](dict)
        for message in self.messages:
            parts += [message.topic, message.payload.decode(errors="replace")]
            kind = topics.parse(message.topic).kind
            if kind == "up":
                index, content = unpack(message.payload)
                chunks[message.topic][index] = content
            elif kind == "artifact":
                name, _, index_ = message.topic.rpartition("/")
                chunks[name][int(index_)] = message.payload
        for pieces in chunks.values():
            content = b"".join(piece for _, piece in sorted(pieces.items()))
            _, magic, body = content.partition(ZSTD_MAGIC)
            with zstandard.ZstdDecompressor().stream_reader(magic + body, read_across_frames=True) as stream:
                parts.append(stream.read().decode(errors="replace"))
        return "\n".join(parts)


@contextlib.contextmanager
def recorded(fleet: Fleet) -> Iterator[Recorder]:
    """A recorder of the fleet's broker, which hears everybody."""
    with Session(fleet.broker.url, f"{fleet.name}-records", session_expiry_s=0) as session:
        session.connect(10)
        session.subscribe(f"edge/1/{fleet.name}/#")
        recorder = Recorder(session)
        yield recorder
        recorder.end()


def node_files(fleet: Fleet) -> str:
    """All that a fleet's node keeps, as text."""
    files = [path for path in (fleet.folder / "node").rglob("*") if path.is_file()]
    return "\n".join(f"{path}\n{path.read_bytes().decode(errors='replace')}" for path in files)
