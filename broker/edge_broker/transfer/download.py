"""A device's side of a global adapter's way down.

    subscribe artifact/<digest>/+ -> want(missing) -> chunks -> digest -> file

What other devices asked for is taken along. The file appears under its digest as its name, and only whole.
"""

import logging
import time
from pathlib import Path

import msgspec

from edge_broker import files, messages, topics
from edge_broker.errors import BadMessage, BrokerError
from edge_broker.events import Connected, Event, Message
from edge_broker.journal import MAX_CHUNKS
from edge_broker.messages import Artifact, Want
from edge_broker.session import Session
from edge_broker.transfer.pace import IDLE_S, retry_s

CREDIT = 256  # chunks asked for at once; brokers drop what exceeds 1,000 queued messages
_MAX_ASKS = 8  # without a chunk in between: about five minutes
_MAX_BROKEN = 2  # whole downloads with the wrong digest

log = logging.getLogger(__name__)


class Fetched(msgspec.Struct, frozen=True):
    """The artifact is in this file, durable, and matches its digest."""

    artifact: Artifact
    path: Path


class Failed(msgspec.Struct, frozen=True):
    """The artifact did not come; the reason is a sentence."""

    artifact: Artifact
    reason: str


class Fetcher:
    """Fetches one artifact at a time into a folder."""

    def __init__(
        self, session: Session, fleet: str, device_id: str, folder: Path, max_bytes: int = 1 << 30
    ) -> None:
        """Prepare; files go to folder under their digest, larger ones than max_bytes are refused."""
        self._session, self._fleet, self._folder = session, fleet, folder
        self._want_topic = topics.want(fleet, device_id)
        self._max_bytes = max_bytes
        self._current: _Download | None = None
        folder.mkdir(parents=True, exist_ok=True)

    def fetch(self, artifact: Artifact) -> Fetched | None:
        """Begin to fetch; another artifact under way is dropped, the same one goes on.

        Returns:
            Fetched at once if the folder has it.

        Raises:
            BrokerError: its numbers do not add up, it is too large, or the subscription failed.
        """
        adds_up = (
            artifact.chunks == -(-artifact.size // artifact.chunk_bytes) and artifact.chunks <= MAX_CHUNKS
        )
        if not adds_up or artifact.size > self._max_bytes:
            raise BrokerError(
                f"an artifact of {artifact.size} bytes in {artifact.chunks} chunks of {artifact.chunk_bytes}; "
                f"this device takes {self._max_bytes} bytes and {MAX_CHUNKS} chunks that add up"
            )
        path = self._folder / artifact.digest
        if path.exists():
            return Fetched(artifact=artifact, path=path)
        if self._current and self._current.artifact == artifact:
            return None
        self.drop()
        self._session.subscribe(topics.all_chunks(self._fleet, artifact.digest))
        self._current = _Download(artifact, path)
        self.tick()
        return None

    def drop(self) -> None:
        """Give up what is under way, if anything is."""
        if self._current:
            self._session.unsubscribe(topics.all_chunks(self._fleet, self._current.artifact.digest))
            self._current.part.unlink(missing_ok=True)
            self._current = None

    def handle(self, message: Message | Event | None) -> Fetched | Failed | None:
        """Take in what the session received (None too: a fetch can fail by waiting); what is not for it is ignored."""
        download = self._current
        if not download:
            return None
        result: Fetched | Failed | None = None
        if isinstance(message, Message):
            try:
                where = topics.parse(message.topic)
                if where.kind == "artifact" and where.digest == download.artifact.digest:
                    result = self._arrived(download, where.chunk, message.payload)
            except BadMessage as error:
                log.warning("ignored a message on %s: %s", message.topic, error)
        elif isinstance(message, Connected) and not message.session_present:
            download.due = time.monotonic()
        if not result and download.asks >= _MAX_ASKS and download.due <= time.monotonic():
            result = self._fail(download, f"no chunk came after asking {download.asks} times")
        return result

    def tick(self, now: float | None = None) -> float:
        """Ask for what is missing when it is due (now: of time.monotonic).

        Returns:
            Seconds until the next tick is of use.
        """
        now = time.monotonic() if now is None else now
        download = self._current
        if not download:
            return IDLE_S
        if download.due <= now and download.asks < _MAX_ASKS:
            asked = download.missing(CREDIT)
            want = Want(digest=download.artifact.digest, missing=messages.to_ranges(asked))
            if not self._session.publish_nowait(self._want_topic, messages.encode(want)):
                return IDLE_S  # a Room or Connected event comes when it can be sent
            download.asked = set(asked)
            download.due = now + retry_s(download.asks)
            download.asks += 1
        return max(0.0, download.due - now)

    def _arrived(self, download: "_Download", index: int, data: bytes) -> Fetched | Failed | None:
        try:
            download.write(index, data)
            if download.left:
                self.tick()
                return None
            wrong = download.finish()
        except OSError as error:
            return self._fail(download, f"cannot write {download.path}: {error}")
        if not wrong:
            self.drop()
            return Fetched(artifact=download.artifact, path=download.path)
        if download.broken + 1 >= _MAX_BROKEN:
            return self._fail(download, wrong)
        log.warning("fetching %s again: %s", download.path.name, wrong)
        download.restart()
        return None

    def _fail(self, download: "_Download", reason: str) -> Failed:
        self.drop()
        return Failed(artifact=download.artifact, reason=reason)


class _Download:
    """The artifact under way; due is when to ask (again), in seconds of time.monotonic."""

    def __init__(self, artifact: Artifact, path: Path) -> None:
        self.artifact, self.path, self.part = artifact, path, path.with_suffix(".part")
        self.broken = -1
        self.restart()

    def restart(self) -> None:
        self.broken += 1
        self.asks, self.due = 0, time.monotonic()
        self.asked: set[int] = set()
        self.left = self.artifact.chunks
        self._here = bytearray(self.artifact.chunks)
        with self.part.open("wb") as file:
            file.truncate(self.artifact.size)

    def missing(self, limit: int) -> list[int]:
        found: list[int] = []
        index = self._here.find(0)
        while index >= 0 and len(found) < limit:
            found.append(index)
            index = self._here.find(0, index + 1)
        return found

    def write(self, index: int, data: bytes) -> None:
        if not (0 <= index < self.artifact.chunks and len(data) == messages.chunk_size(self.artifact, index)):
            raise BadMessage(
                f"chunk {index} of {len(data)} bytes does not fit artifact {self.artifact.digest[:16]}…"
            )
        if self._here[index]:
            return
        with self.part.open("r+b") as file:
            file.seek(index * self.artifact.chunk_bytes)
            file.write(data)
        self._here[index] = 1
        self.left -= 1
        self.asked.discard(index)
        self.asks = 0
        self.due = time.monotonic() + (retry_s(0) if self.asked else 0.0)

    def finish(self) -> str:
        """Put the whole file in place; returns what is wrong with it instead, if its digest is another one."""
        digest, _ = messages.digest_and_size(self.part)
        if digest != self.artifact.digest:
            return f"the bytes have SHA-256 {digest[:16]}…, the artifact is {self.artifact.digest[:16]}…"
        files.put(self.part, self.path)
        return ""
