"""The device's side of a download: fetches a global adapter.

    subscribe artifact/<digest>/+ -> want(missing) -> chunks -> digest -> file

Chunks that other devices asked for are taken too. The file is named by its digest and appears when
complete.
"""

import logging
import time
from pathlib import Path

import msgspec

from edge_broker import chunks, files, messages, topics
from edge_broker.errors import BadMessage, BrokerError
from edge_broker.events import Connected, Event, Message
from edge_broker.messages import Artifact, Want
from edge_broker.session import Session
from edge_broker.transfer.pace import IDLE_S, retry_s

CREDIT = 256  # chunks asked for at once; brokers drop messages over 1,000 in a queue
_MAX_BYTES = 1 << 30  # of the largest artifact
_MAX_ASKS = 8  # without a chunk in between: about five minutes

log = logging.getLogger(__name__)


class Fetched(msgspec.Struct, frozen=True):
    """The artifact is in this file, durable, and matches its digest."""

    artifact: Artifact
    path: Path


class Failed(msgspec.Struct, frozen=True):
    """The artifact did not come."""

    artifact: Artifact
    reason: str  # a sentence for the device's own log; it may name a path


class _Download:
    """The artifact under way."""

    def __init__(self, artifact: Artifact, part: Path, repeated: bool = False) -> None:
        self.artifact, self.part = artifact, part
        self.repeated = repeated  # the digest of a first download was wrong
        self.file = chunks.PartialFile(part, artifact)
        self.due = time.monotonic()  # when to ask again
        self.asks = 0  # since the last chunk
        self.asked: set[int] = set()  # chunks of the last ask that have not come


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

        Returns Fetched at once if the folder has the artifact. Raises BrokerError where its numbers
        do not add up or are too large, and where the broker does not let us subscribe.
        """
        if not chunks.adds_up(artifact) or artifact.size > _MAX_BYTES:
            raise BrokerError(
                f"an artifact of {artifact.size} bytes in {artifact.chunks} chunks of {artifact.chunk_bytes}; "
                f"this device takes {_MAX_BYTES} bytes and {chunks.MAX_CHUNKS} chunks that add up"
            )
        path = self._folder / artifact.digest
        if path.exists():
            return Fetched(artifact=artifact, path=path)
        if not self._current or self._current.artifact != artifact:
            self.drop()
            self._session.subscribe(topics.artifact(self._fleet, artifact.digest, topics.ANY))
            self._current = _Download(artifact, path.with_suffix(".part"))
            self.tick()
        return None

    def drop(self) -> None:
        """Give up the download under way, if there is one."""
        if self._current:
            self._session.unsubscribe(topics.artifact(self._fleet, self._current.artifact.digest, topics.ANY))
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
            except OSError as error:
                result = self._fail(download, f"cannot write {download.part}: {error}")
        # chunks in the broker's queue were lost with its session: ask at once
        elif isinstance(message, Connected) and not message.session_present:
            download.due = time.monotonic()
        if not result and download.asks >= _MAX_ASKS and download.due <= time.monotonic():
            result = self._fail(download, f"no chunk came after asking {download.asks} times")
        return result

    def tick(self) -> float:
        """Ask for missing chunks if that is due. Returns seconds until the next tick is of use."""
        download, now = self._current, time.monotonic()
        if not download:
            return IDLE_S
        if download.due <= now and download.asks < _MAX_ASKS:
            missing = download.file.missing(CREDIT)
            want = Want(digest=download.artifact.digest, missing=chunks.to_ranges(missing))
            if not self._session.publish_nowait(self._want_topic, messages.encode(want)):
                return IDLE_S  # a Room or Connected event comes when it can be sent
            download.asked = set(missing)
            download.due = now + retry_s(download.asks)
            download.asks += 1
        return max(0.0, download.due - now)

    def _arrived(self, download: _Download, index: int, data: bytes) -> Fetched | Failed | None:
        if download.file.write(index, data):
            download.asks = 0
            download.asked.discard(index)
            # all that was asked for has come: ask for the next chunks at once
            download.due = time.monotonic() + (retry_s(0) if download.asked else 0.0)
        if download.file.missing(1):
            return None
        digest, _ = messages.digest_and_size(download.part)
        if digest == download.artifact.digest:
            path = download.part.with_suffix("")
            files.put(download.part, path)
            self.drop()
            return Fetched(artifact=download.artifact, path=path)
        wrong = f"the bytes have SHA-256 {digest[:16]}…, the artifact is {download.artifact.digest[:16]}…"
        if download.repeated:
            return self._fail(download, wrong)
        log.warning("fetching it again: %s", wrong)
        self._current = _Download(download.artifact, download.part, repeated=True)
        return None

    def _fail(self, download: _Download, reason: str) -> Failed:
        self.drop()
        return Failed(artifact=download.artifact, reason=reason)
