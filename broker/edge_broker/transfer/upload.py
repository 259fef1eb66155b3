"""The device's side of an upload: sends the updates of the outbox.

    offer (signed manifest) -> grant(window, missing) -> chunks -> receipt | reject

Updates go one at a time, the oldest first, because a node takes a device's updates in the order of
their sequence numbers. The outbox outlives the process. A new process offers again, and the node's
answer says how to continue. Chunks that turn out too large for the broker are cut smaller, as a new
transfer, because the node binds a transfer to its manifest.
"""

import logging
import random
import time
from collections import deque
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge_broker import chunks, messages, signing, topics
from edge_broker.errors import BadMessage, Refused
from edge_broker.events import Connected, Event, Message, Unsent
from edge_broker.messages import Grant, Inbox, Manifest, Pause, Receipt, Reject
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


class _Upload:
    """The update under way."""

    def __init__(self, manifest: Manifest, payload: Path) -> None:
        self.manifest, self.payload = manifest, payload
        self.due = time.monotonic()  # when to offer again
        self.tries = 0  # offers without an answer
        self.queue: deque[int] = deque()  # granted chunks that are not published
        self.window, self.topic = 1, ""  # of the grant

    def ask_again(self, after_s: float) -> None:
        """Drop the queue and offer again later."""
        self.queue.clear()
        self.due = time.monotonic() + after_s * random.uniform(1.0, 1.25)


class Uploader:
    """Sends the pending updates of the outbox."""

    def __init__(
        self,
        session: Session,
        outbox: Outbox,
        fleet: str,
        device_id: str,
        key: Ed25519PrivateKey,
        on_settled: Callable[[Committed | Rejected], object] = lambda _: None,
    ) -> None:
        """Prepare; call `start` once connected.

        Args:
            session, outbox: both used from the caller's thread.
            fleet, device_id: as in every manifest of the outbox.
            key: signs the manifests; the node knows its public half.
            on_settled: called with an update's final outcome, in the transaction that settles the
                update in the outbox. If on_settled raises, nothing is settled and the node is asked
                again.
        """
        self._session, self._outbox, self._key = session, outbox, key
        self._fleet, self._device = fleet, device_id
        self._offer_topic = topics.offer(fleet, device_id)
        self._on_settled = on_settled
        self._current: _Upload | None = None

    def start(self) -> None:
        """Subscribe to the device's inbox."""
        self._session.subscribe(topics.inbox(self._fleet, self._device, topics.ANY))

    def handle(self, message: Message | Event | None) -> Committed | Rejected | None:
        """Take a message of the session. Other topics are ignored, malformed messages are logged.

        Returns an update's outcome, if any; an unreadable payload is Rejected as "payload", chunks
        that the broker does not take however small as "limit".
        """
        upload = self._current
        result: Committed | Rejected | None = None
        if isinstance(message, Message):
            try:
                source = topics.parse(message.topic)
                if (source.kind, source.fleet, source.device) == ("inbox", self._fleet, self._device):
                    result = self._answered(messages.decode_inbox(message.payload))
            except BadMessage as error:
                log.warning("ignored a message on %s: %s", message.topic, error)
        elif upload and isinstance(message, Connected) and not message.session_present:
            upload.ask_again(0.0)
        elif upload and isinstance(message, Unsent) and message.topic == upload.topic and message.too_large:
            result = self._recut(upload, message.reason)
        elif upload and isinstance(message, Unsent) and message.topic in (self._offer_topic, upload.topic):
            log.warning("%s: %s", message.topic, message.reason)
            upload.ask_again(_REJECTED_S)
        return result or self._send_chunks()

    def offer_now(self) -> None:
        """Offer the oldest pending update at the next tick, because a node has appeared."""
        if self._current and not self._current.queue:
            self._current.ask_again(0.0)

    def tick(self) -> float:
        """Send the offer that is due. Returns seconds until the next tick is of use."""
        now = time.monotonic()
        if self._current is None:
            pending = self._outbox.pending(limit=1)
            if not pending:
                return IDLE_S
            self._current = _Upload(pending[0], self._outbox.payload(pending[0].transfer))
        upload = self._current
        if upload.queue:
            return IDLE_S  # a Room or Connected event comes when more can be sent
        if upload.due <= now:
            offer = signing.sign(self._key, signing.OFFER, messages.encode(upload.manifest))
            try:
                if not self._session.publish_nowait(self._offer_topic, offer):
                    return IDLE_S
            # the broker takes less than an offer: for its operator
            except Refused as error:
                log.error("%s", error)
                upload.ask_again(_REJECTED_S)
                return IDLE_S
            upload.due = now + retry_s(upload.tries)
            upload.tries += 1
        return upload.due - now

    def _answered(self, answer: Inbox) -> Committed | Rejected | None:
        pending = {manifest.transfer: manifest for manifest in self._outbox.pending()}
        manifest = pending.get(answer.transfer)
        if not manifest:
            return None
        # None: the answer is about another update than the one under way
        upload = self._current if self._current and self._current.manifest == manifest else None
        if isinstance(answer, Receipt):
            return self._settle(Committed(manifest=manifest))
        if isinstance(answer, Reject):
            rejected = Rejected(manifest=manifest, code=answer.code, reason=answer.reason, final=answer.final)
            if answer.final:
                return self._settle(rejected)
            if upload:
                upload.ask_again(_REJECTED_S)
            return rejected
        if upload and isinstance(answer, Pause):
            upload.ask_again(answer.seconds)
        elif upload and isinstance(answer, Grant):
            indices = chunks.from_ranges(answer.missing, manifest.chunks)
            # ranges may repeat each other: each chunk is sent once
            upload.queue = deque(dict.fromkeys(islice(indices, chunks.MAX_CHUNKS)))
            upload.window = answer.window
            upload.topic = topics.up(self._fleet, answer.node, self._device, answer.transfer)
            upload.tries, upload.due = 0, time.monotonic() + retry_s(0)
        return None

    def _settle(self, result: Committed | Rejected) -> Committed | Rejected:
        transfer = result.manifest.transfer
        with self._outbox.transaction():
            if isinstance(result, Committed):
                self._outbox.settle(transfer, "committed")
            else:
                self._outbox.settle(transfer, "rejected", result.code, result.reason)
            self._on_settled(result)
        if self._current and self._current.manifest.transfer == transfer:
            self._current = None
        return result

    def _send_chunks(self) -> Committed | Rejected | None:
        """Publish granted chunks, as far as the window has room."""
        upload = self._current
        while upload and upload.queue:
            index = upload.queue[0]
            try:
                chunk = chunks.pack(index, chunks.read(upload.payload, upload.manifest, index))
            except OSError as error:
                reason = f"cannot read its payload: {error}"
                return self._settle(Rejected(upload.manifest, "payload", reason, final=True))
            try:
                if not self._session.publish_nowait(upload.topic, chunk, window=upload.window):
                    break
            except Refused as error:
                return self._recut(upload, str(error))
            upload.queue.popleft()
            upload.due = time.monotonic() + retry_s(0)
        return None

    def _recut(self, upload: _Upload, reason: str) -> Rejected | Committed | None:
        """The broker does not take the update's chunks: cut it smaller, or give it up."""
        chunk_bytes = self._session.chunk_bytes
        if chunk_bytes >= upload.manifest.chunk_bytes:
            return self._settle(Rejected(upload.manifest, "limit", reason, final=True))
        log.info("%s; cut to chunks of %d bytes", reason, chunk_bytes)
        self._current = _Upload(self._outbox.recut(upload.manifest, chunk_bytes), upload.payload)
        return None
