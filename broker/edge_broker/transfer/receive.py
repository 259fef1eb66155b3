"""The node's side of an upload: offers are answered, chunks collected, receipts sent.

    offer      -> verify, check -> grant | pause | receipt | reject
    chunk      -> journal -> the next grant
    last chunk -> digest -> Update -> the owner checks the content -> commit -> receipt

A grant names at most 64 chunks; the next grant follows when they have arrived. At most 768 granted
chunks are under way to a node, because brokers silently drop messages over 1,000 in a queue;
further offers are told to pause. An answer about a settled transfer is read from the journal, so
the answer can be repeated at any time and never says more than is committed.
"""

import logging
import sqlite3
import time
from collections import deque
from collections.abc import Callable

import msgspec

from edge_broker import chunks, messages, signing, topics
from edge_broker.errors import BadMessage, BrokerError
from edge_broker.events import Connected, Event, Message
from edge_broker.journal import Entry, Journal, Update
from edge_broker.messages import Grant, Inbox, Manifest, Pause, Receipt, Reject
from edge_broker.session import Session
from edge_broker.transfer.pace import IDLE_S

UNDER_WAY = 768  # granted chunks that have not arrived, over all transfers
_CREDIT = 64  # chunks a grant
_WINDOW = 8  # chunks of a device without an acknowledgement
_MAX_BYTES = 1 << 30  # of the largest update
_PAUSE_S = 2.0  # for a device that finds no place
_SILENT_S = 30.0  # a transfer without a chunk for so long gives its place to another
_DISK_FULL_S = 60.0  # before the disk is tried again
_MAX_ANSWERS = 4096  # unsent; the oldest are dropped, and devices offer again
_REASON = 1000  # characters of a reason that a device is sent, which may quote what the device sent
_DUPLICATE = "device {0.device} already counts in round {0.round}"  # {0}: the manifest

log = logging.getLogger(__name__)


class _Active:
    """A transfer with chunks under way, which takes a place."""

    def __init__(self, manifest: Manifest, granted: list[int]) -> None:
        self.manifest = manifest
        self.granted = set(granted)  # chunks that have not arrived
        self.last = time.monotonic()  # when its last chunk arrived


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
            check: returns why to refuse a manifest for good, or None; called before any chunk.
            known_key: returns a device's public key (hex), or None if the device is not enrolled.
        """
        self._session, self._journal = session, journal
        self._fleet, self._node = topics.name("fleet", fleet), topics.name("node", node)
        self._check, self._known_key = check, known_key
        self._active: dict[str, _Active] = {}
        self._answers: deque[tuple[str, Inbox]] = deque(maxlen=_MAX_ANSWERS)  # device, answer

    def start(self) -> None:
        """Subscribe to offers and to this node's chunks."""
        self._session.subscribe(
            topics.up(self._fleet, self._node, topics.ANY, topics.ANY), topics.all_offers(self._fleet)
        )

    def handle(self, message: Message | Event | None) -> Update | None:
        """Take a message of the session. Other topics are ignored, malformed messages are logged.

        Returns an update that is complete: the owner checks its content, and commits or rejects it.
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
                    self._answer(source.device, Pause(transfer=transfer, seconds=_DISK_FULL_S))
        elif isinstance(message, Connected) and not message.session_present:
            # chunks on their way were lost with the broker's session: grant them again
            for manifest in self._journal.open_transfers():
                if self._has_place(manifest) and self._journal.missing(manifest, 1):
                    self._grant(manifest)
        return result

    def tick(self) -> float:
        """Send answers that found no room. Returns seconds until the next tick is of use."""
        while self._answers:
            device, answer = self._answers[0]
            topic = topics.inbox(self._fleet, device, answer.transfer)
            if not self._session.publish_nowait(topic, messages.encode(answer)):
                break  # a Room or Connected event comes when it can be sent
            self._answers.popleft()
        return IDLE_S

    def commit(self, transfer: str, within: Callable[[], object] = lambda: None) -> bool:
        """Count a complete update in its round, and send its receipt or its rejection.

        Returns whether the update counts now. within: as `Journal.commit` takes it.
        """
        counts = self._journal.commit(transfer, within)
        entry = self._journal.find(transfer)
        if entry and entry.state == "open":
            self._refuse(entry.manifest, "duplicate", _DUPLICATE.format(entry.manifest))
        else:
            self._answer_settled(entry)
        return counts

    def reject(self, transfer: str, reason: str, code: str = "content") -> None:
        """Refuse an update for good: a complete one, or an open one whose round has closed."""
        if entry := self._journal.find(transfer):
            self._refuse(entry.manifest, code, reason)

    # --- offers

    def _offered(self, device: str, payload: bytes) -> Update | None:
        try:
            manifest = self._read_offer(device, payload)
        except BadMessage as error:
            # Not for good: an unverified offer must not end a transfer of the real device.
            log.warning("refused an offer of %s: %s", device, error)
            if transfer := _claimed_transfer(payload):
                self._answer(device, Reject(transfer, "signature", str(error), final=False))
            return None
        entry = self._journal.find(manifest.transfer)
        # the same offer again: repeat the answer, or go on where the journal stands
        if entry and entry.manifest == manifest:
            if entry.state != "open":
                self._answer_settled(entry)
                return None
        elif not self._acceptable(manifest, offered_before=entry is not None):
            return None
        if not self._has_place(manifest):
            self._answer(device, Pause(transfer=manifest.transfer, seconds=_PAUSE_S))
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

    def _acceptable(self, manifest: Manifest, offered_before: bool) -> bool:
        """Whether a new, verified manifest may be collected; otherwise the device is answered."""
        device, last = manifest.device, self._journal.sequence(manifest.device)
        code, reason = "", ""
        if offered_before:
            code, reason = "changed", "this transfer was offered before with another manifest"
        elif manifest.sequence <= last:
            code = "replay"
            reason = f"sequence {manifest.sequence} is not above {last}, the last one of {device}"
        elif manifest.fleet != self._fleet:
            code, reason = "fleet", f"the update is for fleet {manifest.fleet}, this is {self._fleet}"
        elif manifest.size > _MAX_BYTES:
            code, reason = "size", f"the update has {manifest.size} bytes, this node takes {_MAX_BYTES}"
        elif not chunks.adds_up(manifest):
            cut = f"{manifest.size} bytes in {manifest.chunks} chunks of {manifest.chunk_bytes}"
            code, reason = "size", f"{cut} do not add up, or are more than {chunks.MAX_CHUNKS} chunks"
        elif self._journal.counted(device, manifest.round):
            code, reason = "duplicate", _DUPLICATE.format(manifest)
        elif objection := self._check(manifest):
            code, reason = "check", objection
        if not code:
            return True
        log.warning("refused update %s of %s: %s", manifest.transfer, device, reason)
        if code in ("changed", "replay"):  # nothing to store: the journal has this transfer or a later one
            self._answer(device, Reject(manifest.transfer, code, reason, final=True))
        else:
            self._refuse(manifest, code, reason)
        return False

    # --- chunks

    def _has_place(self, manifest: Manifest) -> bool:
        """Whether the transfer has a place or can have one; silent transfers lose their places."""
        oldest = time.monotonic() - _SILENT_S
        self._active = {name: active for name, active in self._active.items() if active.last >= oldest}
        taken = sum(min(_CREDIT, active.manifest.chunks) for active in self._active.values())
        return manifest.transfer in self._active or taken + min(_CREDIT, manifest.chunks) <= UNDER_WAY

    def _grant(self, manifest: Manifest) -> None:
        granted = self._journal.missing(manifest, _CREDIT)
        self._active[manifest.transfer] = _Active(manifest, granted)
        grant = Grant(manifest.transfer, self._node, window=_WINDOW, missing=chunks.to_ranges(granted))
        self._answer(manifest.device, grant)

    def _arrived(self, device: str, transfer: str, payload: bytes) -> Update | None:
        active = self._active.get(transfer)
        # this process started after the grant, or the transfer was silent and lost its place
        if not active:
            entry = self._journal.find(transfer)
            if not entry or entry.state != "open":
                log.debug("a chunk of %s, which is not open", transfer)
                return None
            active = _Active(entry.manifest, self._journal.missing(entry.manifest, _CREDIT))
            self._active[transfer] = active
        if active.manifest.device != device:
            raise BadMessage(f"{device} sent a chunk of a transfer of {active.manifest.device}")
        index, data = chunks.unpack(payload)
        self._journal.write(active.manifest, index, data)
        active.last = time.monotonic()
        active.granted.discard(index)
        if active.granted:
            return None
        if self._journal.missing(active.manifest, 1):
            self._grant(active.manifest)
            return None
        return self._completed(active.manifest)

    def _completed(self, manifest: Manifest) -> Update | None:
        self._active.pop(manifest.transfer, None)
        try:
            return Update(manifest=manifest, payload=self._journal.verify(manifest))
        except BrokerError as error:
            log.warning("refused update %s of %s: %s", manifest.transfer, manifest.device, error)
            self._refuse(manifest, "digest", str(error))
            return None

    # --- answers

    def _refuse(self, manifest: Manifest, code: str, reason: str) -> None:
        """Refuse a transfer for good, in the journal, then to the device."""
        self._active.pop(manifest.transfer, None)
        self._journal.reject(manifest, code, reason)
        self._answer_settled(self._journal.find(manifest.transfer))

    def _answer_settled(self, entry: Entry | None) -> None:
        if entry and entry.state == "committed":
            self._answer(entry.manifest.device, Receipt(entry.manifest.transfer, entry.manifest.round))
        elif entry and entry.state == "rejected":
            reject = Reject(entry.manifest.transfer, entry.code, entry.reason, final=True)
            self._answer(entry.manifest.device, reject)

    def _answer(self, device: str, answer: Inbox) -> None:
        if isinstance(answer, Reject):
            answer = msgspec.structs.replace(answer, reason=answer.reason[:_REASON])
        self._answers.append((device, answer))
        self.tick()


def _claimed_transfer(payload: bytes) -> str | None:
    """The transfer in an unverified offer, so that the offer can be answered."""
    try:
        return messages.decode(signing.peek(payload).body, Manifest).transfer
    except BadMessage:
        return None
