"""The device's side of an upload: sends the updates of the outbox.

    offer (signed manifest) -> grant(window, missing) -> chunks -> receipt | reject

Updates go one at a time, the oldest first, because a node takes a device's updates in the order of
their sequence numbers. The outbox outlives the process. A new process offers again, and the node's
answer says how to continue.
"""

import logging
import random
import sqlite3
import time
from collections import deque
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import TypeVar

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge_broker import messages, signing, topics
from edge_broker.errors import BadMessage, Refused
from edge_broker.events import Connected, Event, Message, Unsent
from edge_broker.messages import Grant, Manifest, Pause, Receipt, Reject
from edge_broker.outbox import Outbox
from edge_broker.session import Session
from edge_broker.transfer.pace import IDLE_S, retry_s

_REJECTED_S = 30.0  # before an update that was refused for now is offered again

log = logging.getLogger(__name__)


class Committed(msgspec.Struct, frozen=True):
    """The node counts this update."""

    manifest: Manifest


class Rejected(msgspec.Struct, frozen=True):
    """The node refused this update."""

    manifest: Manifest
    code: str
    reason: str
    final: bool  # otherwise the uploader offers it again later


_Settled = TypeVar("_Settled", Committed, Rejected)


class Uploader:
    """Sends the pending updates of the outbox."""

    def __init__(
        self,
        session: Session,
        outbox: Outbox,
        fleet: str,
        device_id: str,
        key: Ed25519PrivateKey,
        on_settled: Callable[[Committed | Rejected, sqlite3.Connection], None] | None = None,
    ) -> None:
        """Prepare; call `start` once connected.

        Args:
            session, outbox: both used from the caller's thread.
            fleet, device_id: as in every manifest of the outbox.
            key: signs the manifests; the node knows its public half.
            on_settled: called when an update is committed or finally rejected, in the transaction that
                settles it in the outbox. If it raises, nothing has changed and the node is asked again.
        """
        self._session, self._outbox, self._key = session, outbox, key
        self._fleet, self._device = fleet, device_id
        self._on_settled = on_settled
        self._current: _Upload | None = None
        self._unreadable: Rejected | None = None  # set by tick, returned by handle

    def start(self) -> None:
        """Subscribe to the device's inbox."""
        self._session.subscribe(topics.all_inbox(self._fleet, self._device))

    def handle(self, message: Message | Event | None) -> Committed | Rejected | None:
        """Take a message of the session. Other topics are ignored, malformed messages are logged.

        Returns:
            The outcome of an update, if there is one; an unreadable payload is Rejected as "payload".
        """
        result: Committed | Rejected | None = None
        if isinstance(message, Message):
            try:
                source = topics.parse(message.topic)
                if (source.kind, source.fleet, source.device) == ("inbox", self._fleet, self._device):
                    result = self._handle_inbox(messages.decode_inbox(message.payload))
            except BadMessage as error:
                log.warning("ignored a message on %s: %s", message.topic, error)
        elif isinstance(message, Connected) and not message.session_present and self._current:
            self._current.ask_again(0.0)
        elif isinstance(message, Unsent) and self._current and message.topic in self._current.topics():
            log.warning("%s: %s", message.topic, message.reason)
            self._current.ask_again(_REJECTED_S)
        self._send_chunks()
        if not result and self._unreadable:
            result, self._unreadable = self._unreadable, None
        return result

    def offer_now(self) -> None:
        """Offer the oldest pending update at the next tick, because a node has appeared."""
        if self._current and not self._current.queue:
            self._current.ask_again(0.0)

    def tick(self) -> float:
        """Send the offer and chunks that are due.

        Returns:
            Seconds until the next tick is of use.
        """
        now = time.monotonic()
        if self._current is None:
            pending = self._outbox.pending(limit=1)
            if not pending:
                return IDLE_S
            self._current = _Upload(pending[0], self._outbox.payload(pending[0].transfer), self._key)
        self._send_chunks()
        return self._offer(now)

    def _offer(self, now: float) -> float:
        upload = self._current
        if upload is None:
            return 0.0
        if upload.queue:
            return IDLE_S  # a Room or Connected event comes when more can be sent
        if upload.due <= now:
            if not self._post(upload.offer_topic, upload.offer, None):
                return IDLE_S
            upload.due = now + retry_s(upload.tries)
            upload.tries += 1
        return upload.due - now

    def _handle_inbox(self, answer: messages.Inbox) -> Committed | Rejected | None:
        entry = self._outbox.find(answer.transfer)
        if not entry or entry[1] != "pending":
            return None
        manifest, upload = entry[0], self._current
        if isinstance(answer, Receipt):
            return self._settle(Committed(manifest=manifest))
        if isinstance(answer, Reject):
            rejected = Rejected(manifest=manifest, code=answer.code, reason=answer.reason, final=answer.final)
            if answer.final:
                return self._settle(rejected)
            if upload and upload.manifest.transfer == answer.transfer:
                upload.ask_again(_REJECTED_S)
            return rejected
        if upload and upload.manifest.transfer == answer.transfer:
            if isinstance(answer, Grant):
                upload.granted(answer, topics.up(self._fleet, answer.node, self._device, answer.transfer))
            elif isinstance(answer, Pause):
                upload.ask_again(answer.seconds)
        return None

    def _settle(self, result: _Settled) -> _Settled:
        transfer = result.manifest.transfer
        with self._outbox.transaction() as database:
            if isinstance(result, Committed):
                self._outbox.commit(transfer)
            else:
                self._outbox.reject(transfer, result.code, result.reason)
            if self._on_settled:
                self._on_settled(result, database)
        self._outbox.tidy(transfer)
        if self._current and self._current.manifest.transfer == transfer:
            self._current = None
        return result

    def _send_chunks(self) -> None:
        upload = self._current
        if upload is None:
            return
        try:
            while chunk := upload.next_chunk():
                if not self._post(upload.up_topic, chunk, upload.window):
                    return
                upload.sent()
        except OSError as error:
            reason = f"cannot read its payload: {error}"
            rejected = Rejected(manifest=upload.manifest, code="payload", reason=reason, final=True)
            self._unreadable = self._settle(rejected)

    def _post(self, topic: str, payload: bytes, window: int | None) -> bool:
        try:
            return self._session.publish_nowait(topic, payload, window=window)
        # the broker's limit fell below this update's chunks: for its operator
        except Refused as error:
            log.error("%s", error)
            if self._current:
                self._current.ask_again(_REJECTED_S)
            return False


class _Upload:
    """The update under way."""

    def __init__(self, manifest: Manifest, payload: Path, key: Ed25519PrivateKey) -> None:
        self.manifest = manifest
        self.due = time.monotonic()  # when to offer again
        self.tries = 0  # offers without an answer
        self.offer_topic = topics.offer(manifest.fleet, manifest.device)
        self.offer = signing.sign(key, signing.OFFER, messages.encode(manifest)).encode()
        self.queue: deque[int] = deque()  # granted chunks that are not published
        self.window, self.up_topic = 1, ""  # of the grant
        self._payload = payload
        self._ready = b""  # the first chunk of the queue, packed; kept while the window is full

    def granted(self, grant: Grant, up_topic: str) -> None:
        """Queue the chunks of a grant."""
        indices = messages.from_ranges(grant.missing, self.manifest.chunks)
        # ranges may repeat each other: each chunk is sent once
        self.queue = deque(dict.fromkeys(islice(indices, messages.MAX_CHUNKS)))
        self.window, self.up_topic, self._ready = grant.window, up_topic, b""
        self.tries, self.due = 0, time.monotonic() + retry_s(0)

    def ask_again(self, after_s: float) -> None:
        """Drop the queue and offer again later."""
        self.queue.clear()
        self._ready = b""
        self.due = time.monotonic() + after_s * random.uniform(1.0, 1.25)

    def next_chunk(self) -> bytes:
        """The next chunk to publish, packed; empty if none is granted. Raises OSError."""
        if self.queue and not self._ready:
            index, size = self.queue[0], self.manifest.chunk_bytes
            with self._payload.open("rb") as file:
                file.seek(index * size)
                data = file.read(size)
            if len(data) != messages.chunk_size(self.manifest, index):
                raise OSError(f"{self._payload} is not as long as it was")
            self._ready = messages.pack_chunk(index, data)
        return self._ready

    def sent(self) -> None:
        """Go on to the chunk after this one."""
        self.queue.popleft()
        self._ready = b""
        self.due = time.monotonic() + retry_s(0)

    def topics(self) -> tuple[str, str]:
        """The topics that this upload publishes to."""
        return self.offer_topic, self.up_topic
