"""The node's side of an upload: offers are answered, chunks collected, receipts sent.

    offer      -> verify, check -> grant | pause | receipt | reject
    chunk      -> journal -> the next grant
    last chunk -> digest -> Update -> the owner checks the content -> commit -> receipt

A grant names at most 64 chunks; the next grant follows when they have arrived. At most 768 granted
chunks are under way to a node, because brokers silently drop messages over 1,000 in a queue; further
offers are told to pause. An answer about a settled transfer is read from the journal when it is sent,
so it can be repeated at any time and never says more than is committed.
"""

import logging
import sqlite3
import time
from collections import deque
from collections.abc import Callable

import msgspec

from edge_broker import messages, signing, topics
from edge_broker.errors import BadMessage, BrokerError
from edge_broker.events import Connected, Event, Message
from edge_broker.journal import Journal, Update
from edge_broker.messages import Grant, Manifest, Pause, Receipt, Reject
from edge_broker.session import Session
from edge_broker.transfer.pace import IDLE_S
from edge_broker.transfer.places import CREDIT, Places

MAX_BYTES = 1 << 30  # of the largest update
_WINDOW = 8  # chunks of a device without an acknowledgement
_PAUSE_S = 2.0  # for a device that finds no place
_DISK_FULL_S = 60.0  # before the disk is tried again
_FLUSH_S = 1.0  # after a chunk, if no further one fills the journal's sixteen
_MAX_ANSWERS = 4096  # unsent; the oldest are dropped, and devices offer again

log = logging.getLogger(__name__)


class Receiver:
    """Collects the updates that devices offer to one node."""

    def __init__(
        self,
        session: Session,
        journal: Journal,
        fleet: str,
        node: str,
        check: Callable[[Manifest], str | None],
        known_key: Callable[[str], str | None],
    ) -> None:
        """Prepare; call `start` once connected.

        Args:
            session: with expiry 0, because the offers are a shared subscription.
            journal: used from the caller's thread.
            fleet, node: whose offers are taken, and the name that chunks are addressed to.
            check: the reason to refuse a manifest for good, or None; called before any chunk is taken.
            known_key: returns a device's public key (hex), or None if the device is not enrolled.
        """
        self._session, self._journal = session, journal
        self._fleet, self._node = topics.name("fleet", fleet), topics.name("node", node)
        self._check, self._known_key = check, known_key
        self._places = Places()
        self._answers: deque[tuple[str, str, msgspec.Struct | None]] = deque(maxlen=_MAX_ANSWERS)
        self._flush_at: float | None = None

    def start(self) -> None:
        """Subscribe to offers and to this node's chunks."""
        self._session.subscribe(topics.all_up(self._fleet, self._node), topics.all_offers(self._fleet))

    def handle(self, message: Message | Event | None) -> Update | None:
        """Take a message of the session. Other topics are ignored, malformed messages are logged.

        Returns:
            A complete update: the owner checks the content, then calls `commit` or `reject`.
        """
        result = None
        if isinstance(message, Message):
            try:
                source = topics.parse(message.topic)
                if source.kind == "offer" and source.fleet == self._fleet:
                    result = self._offered(source.device, message.payload)
                elif (source.kind, source.fleet, source.node) == ("up", self._fleet, self._node):
                    result = self._arrived(source.device, source.transfer, message.payload)
            except BadMessage as error:
                log.warning("ignored a message on %s: %s", message.topic, error)
            except (OSError, sqlite3.OperationalError) as error:
                log.error("cannot keep an update: %s", error)
                if transfer := source.transfer or _claimed_transfer(message.payload):
                    self._queue(source.device, Pause(transfer=transfer, seconds=_DISK_FULL_S))
        elif isinstance(message, Connected) and not message.session_present:
            # chunks on their way were lost with the broker's session: grant them again
            for manifest in self._journal.open_transfers():
                if self._places.has_room(manifest) and self._journal.missing(manifest, 1):
                    self._grant(manifest)
        self._send_answers()
        return result

    def tick(self) -> float:
        """Send answers and flush chunks that are due.

        Returns:
            Seconds until the next tick is of use.
        """
        now = time.monotonic()
        self._send_answers()
        if self._flush_at is not None and self._flush_at <= now:
            try:
                self._journal.flush()
                self._flush_at = None
            except (OSError, sqlite3.OperationalError) as error:
                log.error("cannot keep what came of updates: %s", error)
                self._flush_at = now + _DISK_FULL_S
        return IDLE_S if self._flush_at is None else max(0.0, self._flush_at - now)

    def commit(self, transfer: str, within: Callable[[sqlite3.Connection], None] | None = None) -> bool:
        """Count a complete update in its round, and send its receipt.

        Args:
            transfer: of an update that `handle` returned.
            within: changes of the caller in the same transaction; called only if the update counts.

        Returns:
            Whether the update counts now for the first time. Inside a transaction of the caller the
            receipt waits for the next `tick`.
        """
        with self._journal.transaction() as database:
            counts = self._journal.commit(transfer)
            entry = self._journal.find(transfer)
            if counts and within:
                within(database)
            elif entry and entry.state == "open":
                self._journal.reject(entry.manifest, "duplicate", _duplicate(entry.manifest))
        self._journal.tidy(transfer)
        self._answer(transfer)
        return counts

    def reject(self, transfer: str, reason: str, code: str = "content") -> None:
        """Refuse an update for good: a complete one, or an open one whose round has closed."""
        self._places.free(transfer)
        if entry := self._journal.find(transfer):
            self._journal.reject(entry.manifest, code, reason)
            self._answer(transfer)

    # --- offers

    def _offered(self, device: str, payload: bytes) -> Update | None:
        try:
            manifest = self._read_offer(device, payload)
        except BadMessage as error:
            # Not for good: an unverified offer must not end a transfer of the real device.
            log.warning("refused an offer of %s: %s", device, error)
            if transfer := _claimed_transfer(payload):
                reject = Reject(transfer=transfer, code="signature", reason=str(error), final=False)
                self._queue(device, reject)
            return None
        entry = self._journal.find(manifest.transfer)
        # the same offer again: repeat the answer, or go on where the journal stands
        if entry and entry.manifest == manifest:
            if entry.state != "open":
                self._answer(manifest.transfer)
                return None
        elif not self._acceptable(manifest, offered_before=entry is not None):
            return None
        if not self._places.has_room(manifest):
            self._queue(device, Pause(transfer=manifest.transfer, seconds=_PAUSE_S))
            return None
        if not entry:
            self._journal.open(manifest)
        elif not self._journal.missing(manifest, 1):
            return self._completed(manifest)
        self._grant(manifest)
        return None

    def _acceptable(self, manifest: Manifest, offered_before: bool) -> bool:
        """Whether a new manifest may be collected; otherwise the device is answered."""
        device, last = manifest.device, self._journal.sequence(manifest.device)
        code, reason = "", ""
        if offered_before:
            code, reason = "changed", "this transfer was offered before with another manifest"
        elif manifest.sequence <= last:
            code = "replay"
            reason = f"sequence {manifest.sequence} is not above {last}, the last one of {device}"
        if code:  # nothing to store: the journal has this transfer or a later one
            self._queue(device, Reject(transfer=manifest.transfer, code=code, reason=reason, final=True))
            return False
        code, reason = self._refusal(manifest)
        if code:
            log.warning("refused update %s of %s: %s", manifest.transfer, device, reason)
            self._journal.reject(manifest, code, reason)
            self._answer(manifest.transfer)
        return not code

    def _read_offer(self, device: str, payload: bytes) -> Manifest:
        key = self._known_key(device)
        if key is None:
            raise BadMessage(f"device {device} is not enrolled with this node")
        body, _ = signing.open(payload, signing.OFFER, key)
        manifest = messages.decode(body, Manifest)
        if manifest.device != device:
            raise BadMessage(f"the manifest is of device {manifest.device}, offered by {device}")
        return manifest

    def _refusal(self, manifest: Manifest) -> tuple[str, str]:
        """The code and the reason to refuse a verified manifest; empty to take it."""
        if manifest.fleet != self._fleet:
            return "fleet", f"the update is for fleet {manifest.fleet}, this is {self._fleet}"
        if manifest.size > MAX_BYTES:
            return ("size", f"the update has {manifest.size} bytes, this node takes {MAX_BYTES}")
        if not messages.adds_up(manifest):
            cut = f"{manifest.size} bytes in {manifest.chunks} chunks of {manifest.chunk_bytes}"
            return "size", f"{cut} do not add up, or are more than {messages.MAX_CHUNKS} chunks"
        if self._journal.counted(manifest.device, manifest.round):
            return "duplicate", _duplicate(manifest)
        reason = self._check(manifest)
        return ("check", reason) if reason else ("", "")

    # --- chunks

    def _grant(self, manifest: Manifest) -> None:
        granted = self._journal.missing(manifest, CREDIT)
        self._places.take(manifest, granted)
        ranges = messages.to_ranges(granted)
        grant = Grant(transfer=manifest.transfer, node=self._node, window=_WINDOW, missing=ranges)
        self._queue(manifest.device, grant)

    def _arrived(self, device: str, transfer: str, payload: bytes) -> Update | None:
        # this process started after the grant, or the transfer was silent and lost its place
        active = self._places.find(transfer)
        if not active:
            entry = self._journal.find(transfer)
            if not entry or entry.state != "open":
                log.debug("a chunk of %s, which is not open", transfer)
                return None
            active = self._places.take(entry.manifest, self._journal.missing(entry.manifest, CREDIT))
        if active.manifest.device != device:
            raise BadMessage(f"{device} sent a chunk of a transfer of {active.manifest.device}")
        index, data = messages.unpack_chunk(payload)
        self._journal.write(active.manifest, index, data)
        active.last = time.monotonic()
        active.granted.discard(index)
        if active.granted:
            self._flush_at = self._flush_at or active.last + _FLUSH_S
        elif self._journal.missing(active.manifest, 1):
            self._grant(active.manifest)
        else:
            return self._completed(active.manifest)
        return None

    def _completed(self, manifest: Manifest) -> Update | None:
        self._places.free(manifest.transfer)
        try:
            payload = self._journal.verify(manifest)
        except BrokerError as error:
            log.warning("refused update %s of %s: %s", manifest.transfer, manifest.device, error)
            self._journal.reject(manifest, "digest", str(error))
            self._answer(manifest.transfer)
            return None
        return Update(manifest=manifest, payload=payload)

    # --- answers

    def _queue(self, device: str, answer: Grant | Pause | Reject) -> None:
        self._answers.append((device, answer.transfer, answer))

    def _answer(self, transfer: str) -> None:
        """Send the outcome of a settled transfer."""
        if entry := self._journal.find(transfer):
            self._answers.append((entry.manifest.device, transfer, None))
            self._send_answers()

    def _send_answers(self) -> None:
        while self._answers and not self._journal.in_transaction:
            device, transfer, prepared = self._answers[0]
            answer = prepared or self._outcome(transfer)
            topic = topics.inbox(self._fleet, device, transfer)
            if answer and not self._session.publish_nowait(topic, messages.encode(answer)):
                return
            self._answers.popleft()

    def _outcome(self, transfer: str) -> Receipt | Reject | None:
        entry = self._journal.find(transfer)
        if entry and entry.state == "committed":
            return Receipt(transfer=transfer, round=entry.manifest.round)
        if entry and entry.state == "rejected":
            return Reject(transfer=transfer, code=entry.code or "", reason=entry.reason or "", final=True)
        return None


def _duplicate(manifest: Manifest) -> str:
    return f"device {manifest.device} already counts in round {manifest.round}"


def _claimed_transfer(payload: bytes) -> str | None:
    """The transfer an unverified offer speaks of, to be able to answer it."""
    try:
        return messages.decode(signing.peek(payload).body, Manifest).transfer
    except BadMessage:
        return None
