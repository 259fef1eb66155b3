"""The node's side of an update's way up.

    offer -> verify, check -> grant | pause | receipt | reject
    chunk -> journal -> next grant, or all here: digest -> Complete -> the owner checks the content -> commit -> receipt

A grant names at most 64 chunks and the next one follows when they are here; offers that would bring what is under way
to this node over 768 chunks have to wait, since brokers drop what exceeds 1,000 queued messages without a word. What
the node says of a transfer is read from the journal at the moment of saying it, so an answer can be repeated at any
time and never says more than is committed.
"""

import logging
import sqlite3
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import msgspec

from edge_broker import messages, signing, topics
from edge_broker.errors import BadMessage, BrokerError
from edge_broker.events import Connected, Event, Message
from edge_broker.journal import MAX_CHUNKS, Journal
from edge_broker.messages import Grant, Manifest, Pause, Receipt, Reject
from edge_broker.session import Session
from edge_broker.transfer.pace import IDLE_S

CREDIT = 64  # chunks a grant
UNDER_WAY = 768  # chunks
_WINDOW = 8
_SILENT_S = 30.0  # a transfer without a chunk for so long gives its place to another
_PAUSE_S = 2.0
_DISK_FULL_S = 60.0
_FLUSH_S = 1.0
_MAX_ANSWERS = 4096

log = logging.getLogger(__name__)


class Complete(msgspec.Struct, frozen=True):
    """All bytes are here, durable, and match the digest: check the content, then `commit` or `reject`."""

    manifest: Manifest
    payload: Path


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
        max_bytes: int = 1 << 30,
    ) -> None:
        """Prepare; call `start` once connected.

        Args:
            session: with clean start and expiry 0, as the offers are a shared subscription.
            journal: used from the caller's thread.
            fleet, node: whose offers, and the name chunks are addressed to.
            check: the reason to refuse a manifest for good, or None; asked once, before any chunk is accepted.
            known_key: a device's public key (hex), or None if it is not enrolled.
            max_bytes: the largest update taken at all.
        """
        self._session, self._journal = session, journal
        self._fleet, self._node = topics.name("fleet", fleet), topics.name("node", node)
        self._check, self._known_key, self._max_bytes = check, known_key, max_bytes
        self._active: dict[str, _Active] = {}
        self._answers: deque[tuple[str, str, msgspec.Struct | None]] = deque(maxlen=_MAX_ANSWERS)
        self._flush_at: float | None = None

    def start(self) -> None:
        """Subscribe to offers and to this node's chunks."""
        self._session.subscribe(topics.all_up(self._fleet, self._node), topics.all_offers(self._fleet))

    def handle(self, message: Message | Event | None) -> Complete | None:
        """Take in what the session received; what is not for transfers is ignored, malformed messages are logged."""
        result = None
        if isinstance(message, Message):
            try:
                where = topics.parse(message.topic)
                if where.kind == "offer" and where.fleet == self._fleet:
                    result = self._offered(where.device, message.payload)
                elif (where.kind, where.fleet, where.node) == ("up", self._fleet, self._node):
                    result = self._arrived(where.device, where.transfer, message.payload)
            except BadMessage as error:
                log.warning("ignored a message on %s: %s", message.topic, error)
            except (OSError, sqlite3.OperationalError) as error:
                log.error("cannot keep an update: %s", error)
                if transfer := where.transfer or _claimed_transfer(message.payload):
                    self._say(where.device, Pause(transfer=transfer, seconds=_DISK_FULL_S))
        elif isinstance(message, Connected) and not message.session_present:
            for manifest in self._journal.open_transfers():  # what was under way is lost: ask for the rest
                if self._has_place(manifest) and self._journal.missing(manifest, 1):
                    self._grant(manifest)
        self._send_answers()
        return result

    def tick(self, now: float | None = None) -> float:
        """Answer and flush what is due (now: of time.monotonic).

        Returns:
            Seconds until the next tick is of use.
        """
        now = time.monotonic() if now is None else now
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
            transfer: of a Complete.
            within: what the caller changes in the same transaction; not called if the update does not count.

        Returns:
            Whether it counts now for the first time. In a transaction of the caller's the receipt waits for the next
            `tick`.
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
        """Refuse an update for good and say why: a complete one, or one still open when its round has closed."""
        self._active.pop(transfer, None)
        if entry := self._journal.find(transfer):
            self._journal.reject(entry.manifest, code, reason)
            self._answer(transfer)

    # --- offers

    def _offered(self, device: str, payload: bytes) -> Complete | None:
        try:
            manifest = self._read_offer(device, payload)
        except BadMessage as error:
            # Not for good: the offer proves nothing, so it must not be able to end a transfer of the real device.
            log.warning("refused an offer of %s: %s", device, error)
            if transfer := _claimed_transfer(payload):
                self._say(device, Reject(transfer=transfer, code="signature", reason=str(error), final=False))
            return None
        entry = self._journal.find(manifest.transfer)
        if entry and entry.manifest == manifest:
            if entry.state != "open":
                self._answer(manifest.transfer)
                return None
        else:
            code, reason = (
                ("changed", "this transfer was offered before with another manifest") if entry else ("", "")
            )
            if not code and manifest.sequence <= (seen := self._journal.sequence(device)):
                code, reason = (
                    "replay",
                    f"sequence {manifest.sequence} is not above {seen}, the last one of {device}",
                )
            if code:  # nothing to keep: the journal already knows this transfer or a later one
                self._say(device, Reject(transfer=manifest.transfer, code=code, reason=reason, final=True))
                return None
            code, reason = self._refusal(manifest)
            if code:
                log.warning("refused update %s of %s: %s", manifest.transfer, device, reason)
                self._journal.reject(manifest, code, reason)
                self._answer(manifest.transfer)
                return None
        if not self._has_place(manifest):
            self._say(device, Pause(transfer=manifest.transfer, seconds=_PAUSE_S))
            return None
        if not entry:
            self._journal.open(manifest)
        elif not self._journal.missing(manifest, 1):
            return self._completed(manifest)
        self._grant(manifest)
        return None

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
        if manifest.size > self._max_bytes:
            return ("size", f"the update has {manifest.size} bytes, this node takes {self._max_bytes}")
        if manifest.chunks != -(-manifest.size // manifest.chunk_bytes) or manifest.chunks > MAX_CHUNKS:
            cut = f"{manifest.size} bytes in {manifest.chunks} chunks of {manifest.chunk_bytes}"
            return "size", f"{cut} do not add up, or are more than {MAX_CHUNKS} chunks"
        if self._journal.counted(manifest.device, manifest.round):
            return "duplicate", _duplicate(manifest)
        reason = self._check(manifest)
        return ("check", reason) if reason else ("", "")

    def _has_place(self, manifest: Manifest) -> bool:
        oldest = time.monotonic() - _SILENT_S
        for silent in [name for name, active in self._active.items() if active.last < oldest]:
            del self._active[silent]
        taken = sum(min(CREDIT, active.manifest.chunks) for active in self._active.values())
        return manifest.transfer in self._active or taken + min(CREDIT, manifest.chunks) <= UNDER_WAY

    # --- chunks

    def _grant(self, manifest: Manifest) -> None:
        granted = self._journal.missing(manifest, CREDIT)
        self._active[manifest.transfer] = _Active(manifest, granted)
        ranges = messages.to_ranges(granted)
        self._say(
            manifest.device,
            Grant(transfer=manifest.transfer, node=self._node, window=_WINDOW, missing=ranges),
        )

    def _arrived(self, device: str, transfer: str, payload: bytes) -> Complete | None:
        active = self._active.get(transfer)
        if not active:
            entry = self._journal.find(transfer)
            if not entry or entry.state != "open":
                log.debug("a chunk of %s, which is not open", transfer)
                return None
            active = self._active[transfer] = _Active(
                entry.manifest, self._journal.missing(entry.manifest, CREDIT)
            )
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

    def _completed(self, manifest: Manifest) -> Complete | None:
        self._active.pop(manifest.transfer, None)
        try:
            payload = self._journal.verify(manifest)
        except BrokerError as error:
            log.warning("refused update %s of %s: %s", manifest.transfer, manifest.device, error)
            self._journal.reject(manifest, "digest", str(error))
            self._answer(manifest.transfer)
            return None
        return Complete(manifest=manifest, payload=payload)

    # --- answers

    def _say(self, device: str, what: Grant | Pause | Reject) -> None:
        self._answers.append((device, what.transfer, what))

    def _answer(self, transfer: str) -> None:
        """Say what became of a settled transfer."""
        if entry := self._journal.find(transfer):
            self._answers.append((entry.manifest.device, transfer, None))
            self._send_answers()

    def _send_answers(self) -> None:
        while self._answers and not self._journal.in_transaction:
            device, transfer, said = self._answers[0]
            if (said := said or self._outcome(transfer)) and not self._session.publish_nowait(
                topics.inbox(self._fleet, device, transfer), messages.encode(said)
            ):
                return
            self._answers.popleft()

    def _outcome(self, transfer: str) -> Receipt | Reject | None:
        entry = self._journal.find(transfer)
        if entry and entry.state == "committed":
            return Receipt(transfer=transfer, round=entry.manifest.round)
        if entry and entry.state == "rejected":
            return Reject(transfer=transfer, code=entry.code or "", reason=entry.reason or "", final=True)
        return None


class _Active:
    """A transfer whose chunks are on their way: granted are those not here yet."""

    def __init__(self, manifest: Manifest, granted: list[int]) -> None:
        self.manifest, self.granted, self.last = manifest, set(granted), time.monotonic()


def _duplicate(manifest: Manifest) -> str:
    return f"device {manifest.device} already counts in round {manifest.round}"


def _claimed_transfer(payload: bytes) -> str | None:
    """The transfer an unverified offer speaks of, to be able to answer it."""
    try:
        return messages.decode(signing.peek(payload).body, Manifest).transfer
    except BadMessage:
        return None
