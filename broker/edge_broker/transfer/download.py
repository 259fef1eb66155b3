"""The device's side of a download: fetches a global adapter.

    subscribe artifact/<digest>/+ -> want(missing) -> chunks -> digest -> file

Chunks that other devices asked for are taken too. The file is named by its digest and appears when
complete.
"""

import logging
import time
from itertools import islice
from pathlib import Path

import msgspec

from edge_broker import files, messages, topics
from edge_broker.errors import BadMessage, BrokerError
from edge_broker.events import Connected, Event, Message
from edge_broker.messages import Artifact, Want
from edge_broker.session import Session
from edge_broker.transfer.pace import IDLE_S, retry_s

CREDIT = 256  # chunks asked for at once; brokers drop messages over 1,000 in a queue
MAX_BYTES = 1 << 30  # of the largest artifact
_MAX_ASKS = 8  # without a chunk in between: about five minutes
_MAX_BROKEN = 2  # complete downloads with a wrong digest

log = logging.getLogger(__name__)


class Fetched(msgspec.Struct, frozen=True):
    """The artifact is in this file, durable, and matches its digest."""

    artifact: Artifact
    path: Path


class Failed(msgspec.Struct, frozen=True):
    """The artifact did not come."""

    artifact: Artifact
    reason: str  # a sentence for the device's own log; it may name a path


class Fetcher:
    """Fetches one artifact at a time into a folder."""

    def __init__(self, session: Session, fleet: str, device_id: str, folder: Path) -> None:
        """Prepare; files go to folder."""
        self._session, self._fleet, self._folder = session, fleet, folder
        self._want_topic = topics.want(fleet, device_id)
        self._current: _Download | None = None
        folder.mkdir(parents=True, exist_ok=True)

    def fetch(self, artifact: Artifact) -> Fetched | None:
        """Begin to fetch; another artifact under way is dropped, the same one goes on.

        Returns:
            Fetched at once if the folder has it.

        Raises:
            BrokerError: the artifact's numbers do not add up or are too large; no subscription.
        """
        if not messages.adds_up(artifact) or artifact.size > MAX_BYTES:
            raise BrokerError(
                f"an artifact of {artifact.size} bytes in {artifact.chunks} chunks of {artifact.chunk_bytes}; "
                f"this device takes {MAX_BYTES} bytes and {messages.MAX_CHUNKS} chunks that add up"
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
        """Give up the download under way, if there is one."""
        if self._current:
            self._session.unsubscribe(topics.all_chunks(self._fleet, self._current.artifact.digest))
            self._current.part.unlink(missing_ok=True)
            self._current = None

    def handle(self, message: Message | Event | None) -> Fetched | Failed | None:
        """Take a message of the session; None after a wait, since a fetch can fail by waiting."""
        download = self._current
        if not download:
            return None
        result: Fetched | Failed | None = None
        if isinstance(message, Message):
            try:
                source = topics.parse(message.topic)
                if source.kind == "artifact" and source.digest == download.artifact.digest:
                    result = self._arrived(download, source.chunk, message.payload)
            except BadMessage as error:
                log.warning("ignored a message on %s: %s", message.topic, error)
        # chunks in the broker's queue were lost with its session: ask at once
        elif isinstance(message, Connected) and not message.session_present:
            download.due = time.monotonic()
        if not result and download.asks >= _MAX_ASKS and download.due <= time.monotonic():
            result = self._fail(download, f"no chunk came after asking {download.asks} times")
        return result

    def tick(self, now: float | None = None) -> float:
        """Ask for missing chunks when that is due (now: of time.monotonic).

        Returns:
            Seconds until the next tick is of use.
        """
        now = time.monotonic() if now is None else now
        download = self._current
        if not download:
            return IDLE_S
        if download.due <= now and download.asks < _MAX_ASKS:
            asked = download.missing(CREDIT)
            body = messages.encode(Want(digest=download.artifact.digest, missing=messages.to_ranges(asked)))
            if not self._session.publish_nowait(self._want_topic, body):
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
    """The artifact under way."""

    def __init__(self, artifact: Artifact, path: Path) -> None:
        self.artifact, self.path, self.part = artifact, path, path.with_suffix(".part")
        self.broken = -1
        self.restart()

    def restart(self) -> None:
        """Forget all chunks and begin anew."""
        self.broken += 1  # complete downloads with a wrong digest
        self.asks = 0  # since the last chunk
        self.due = time.monotonic()  # when to ask again
        self.asked: set[int] = set()
        self.left = self.artifact.chunks  # chunks that are not written
        self._written = bytearray(self.artifact.chunks)
        with self.part.open("wb") as file:
            file.truncate(self.artifact.size)

    def missing(self, limit: int) -> list[int]:
        """The first chunks that are not written."""
        indices = (index for index, flag in enumerate(self._written) if not flag)
        return list(islice(indices, limit))

    def write(self, index: int, data: bytes) -> None:
        """Write a chunk; a repeated one is ignored. Raises BadMessage for one that does not fit."""
        if not (0 <= index < self.artifact.chunks and len(data) == messages.chunk_size(self.artifact, index)):
            raise BadMessage(
                f"chunk {index} of {len(data)} bytes does not fit artifact {self.artifact.digest[:16]}…"
            )
        if self._written[index]:
            return
        with self.part.open("r+b") as file:
            file.seek(index * self.artifact.chunk_bytes)
            file.write(data)
        self._written[index] = 1
        self.left -= 1
        self.asked.discard(index)
        self.asks = 0
        # all that was asked for has come: ask for the next chunks at once
        self.due = time.monotonic() + (retry_s(0) if self.asked else 0.0)

    def finish(self) -> str:
        """Give the complete file its name, or return why it has a wrong digest."""
        digest, _ = messages.digest_and_size(self.part)
        if digest != self.artifact.digest:
            return f"the bytes have SHA-256 {digest[:16]}…, the artifact is {self.artifact.digest[:16]}…"
        files.put(self.part, self.path)
        return ""
