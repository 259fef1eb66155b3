"""The aggregator: announces rounds, takes in updates, merges, and publishes global versions.

    announced -> collecting -> merging -> published -> next
        collecting -> merging      with a quorum, when all devices that are there are in or at the deadline
        collecting -> collecting   at a deadline below the quorum, as often as the fleet extends
    after the last round: finishing -> ended, when all devices that are there have reported or at the deadline

One loop reads the session's queue. Store and journal share a SQLite file, so an aggregator that was
killed goes on in the same round with every committed update. A merge that was interrupted is
repeated from the journal.
"""

import logging
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import msgspec
from edge_broker import messages, signing, topics
from edge_broker.address import Address
from edge_broker.errors import BadMessage, BrokerError
from edge_broker.journal import Journal, Update
from edge_broker.presence import PresenceSpec
from edge_broker.session import Connected, Event, Message, Session
from edge_broker.transfer import Publisher, Receiver

from edge_runtime import methods
from edge_runtime.aggregator import check, merge, opening
from edge_runtime.aggregator.announce import Announcer
from edge_runtime.aggregator.attendance import Attendance
from edge_runtime.aggregator.claim import Claim
from edge_runtime.aggregator.clock import RoundClock
from edge_runtime.aggregator.store import NodeStore, Version
from edge_runtime.errors import EdgeError, InputError, UnreachableError
from edge_runtime.methods.interface import Method, Tensors
from edge_runtime.protocol.report import REPORT_DOMAIN, Report, failure
from edge_runtime.settings import Fleet
from edge_runtime.trainer import data

log = logging.getLogger(__name__)


class NodeOptions(NamedTuple):
    """Options of a node, beside its fleet."""

    broker: Address
    state: Path  # folder of the database, the key and the versions
    node: str  # this node's name
    until_finished: bool  # end after the last round's reports; else serve for ever


class Exchange(NamedTuple):
    """A node's work on payloads; benchmarks of the link alone replace DELTAS by another."""

    check: Callable[[bytes, check.Shapes, Fleet, Method], Tensors]
    merge: Callable[[list[Update], Mapping[str, Version], Fleet, Method, int, Path], list[Version]]


DELTAS = Exchange(check.check, merge.merge)


class NodeEvent(msgspec.Struct, frozen=True, omit_defaults=True):
    """A change of the round, for whoever watches the node."""

    round: int
    phase: str
    text: str = ""
    in_: tuple[str, ...] = ()  # devices that count in the round
    missing: tuple[str, ...] = ()  # devices that were seen, and do not count
    seconds: float = 0.0  # of a merge


class Node:
    """One fleet's node. `run` returns when all rounds are merged and reported, or never."""

    def __init__(
        self,
        fleet: Fleet,
        options: NodeOptions,
        tell: Callable[[NodeEvent], None],
        exchange: Exchange = DELTAS,
    ) -> None:
        """Open the state; nothing is sent yet.

        Raises:
            InputError: the fleet is closed and the broker takes anyone; its method is not known, or
                cannot merge the ranks its devices may take; its public texts cannot be read; or the
                state was made with other settings.
        """
        opening.check_broker(fleet, options.broker)
        texts = opening.public_texts(fleet)
        if fleet.public is not None:
            public = msgspec.structs.replace(fleet.public, texts=len(texts))
            fleet = msgspec.structs.replace(fleet, public=public)
        self.fleet, self.options, self._tell, self._exchange = fleet, options, tell, exchange
        self._method = methods.of(fleet)
        self._store = NodeStore(options.state / "node.db")
        self._journal = Journal(self._store.connection, options.state)
        opening.check_settings(fleet, texts, self._store, self._journal, options.state)
        self._texts = data.write_rows(options.state / "texts.jsonl", texts) if texts else None
        self._key = signing.load_or_create_key(options.state / "node.key")
        # each process has a client id of its own: a second node by mistake must not cut off the first
        client = topics.client_id("node", fleet.name, options.node, uuid.uuid4().hex)
        spec = PresenceSpec(fleet.name, "", at_once=False)
        self._session = Session(options.broker, client, presence=spec, session_expiry_s=0)
        self._claim = Claim(self._session, fleet.name)
        self._receiver = Receiver(
            self._session,
            self._journal,
            fleet.name,
            options.node,
            lambda manifest: check.refusal(manifest, fleet, self._round),
            self._store.key,
        )
        self._publisher = Publisher(self._session, fleet.name)
        self._announcer = Announcer(self._session, self._publisher, fleet, options.node, self._key)
        self._attendance = Attendance(self._session, fleet.name)
        self._clock = RoundClock()
        self._round = self._store.open_round()  # one past the fleet's rounds: finishing
        self._serving = self._ended = False
        self._texts_suffice = True

    def run(self) -> None:
        """Serve the fleet.

        Raises:
            UnreachableError: there is no broker, or it does not let this node serve.
            InputError: the fleet has another node.
            EdgeError: a round stayed below its quorum through all its extensions.
        """
        with closing(self._store.connection), self._session:
            opening.connect(self._session)
            while not self._ended:
                # one wait for messages, deadlines, chunks that are due and outages
                due_s = min(self._receiver.tick(), self._publisher.tick())
                due_s = min(due_s, self._clock.due_s, self._attendance.due_s, self._claim.due_s)
                for item in self._claim.admit(self._session.receive(max(due_s, 0.0))):
                    self._handle(item)
                # reports that came before a merge ended can make the next transition due at once
                while self._clock.may_close and self._advance():
                    pass

    # --- the states

    @property
    def _finishing(self) -> bool:
        """Whether all rounds are merged, and reports of the last version are awaited."""
        return self._round > self.fleet.rounds

    def _open_round(self) -> None:
        """Published -> collecting, or finishing after the last round."""
        opening.end_earlier_rounds(self._round, self._store, self._journal, self._receiver)
        self._announce()
        self._clock.start(self.fleet.deadline_s)
        self._say("finishing" if self._finishing else "collecting")

    def _announce(self) -> None:
        self._announcer.announce(self._round, self._store.versions(), self._texts)

    def _advance(self) -> bool:
        """Take the transition that is due. Returns whether another transition may be due."""
        counted, late = self._counted(), self._clock.late
        complete = len(counted) >= self.fleet.quorum and (late or not self._waiting(counted))
        if self._finishing:
            if self.options.until_finished and (complete or late):
                self._say("finished")
                self._ended = True
            return False
        if complete:
            self._close_round()
            self._open_round()
        elif late:
            self._extend(counted)
        return complete

    def _close_round(self) -> None:
        """Collecting -> merging -> published."""
        started = time.monotonic()
        self._say("merging")
        updates, before = self._journal.committed(self._round), self._store.versions()
        folder = self.options.state / "versions"
        versions = self._exchange.merge(updates, before, self.fleet, self._method, self._round, folder)
        self._store.merged(self._round, versions)
        # which labels there are is known from the versions alone; the warning comes once
        self._texts_suffice = self._texts_suffice and opening.texts_suffice(self.fleet, versions)
        self._say("merged", seconds=time.monotonic() - started)
        self._round += 1

    def _extend(self, counted: set[str]) -> None:
        """Collecting -> collecting, with a new deadline."""
        used = self._store.extensions(self._round)
        if used >= self.fleet.extensions:
            raise EdgeError(
                f"round {self._round} has {len(counted)} of the {self.fleet.quorum} updates of its quorum after "
                f"{used + 1} deadlines of {self.fleet.deadline_s:g} s; missing: "
                f"{', '.join(self._missing(counted)) or 'unknown devices'}"
            )
        self._store.extend(self._round)
        self._clock.start(self.fleet.deadline_s)
        self._say("extended", text=f"below the quorum of {self.fleet.quorum}")

    # --- who is in

    def _counted(self) -> set[str]:
        """Devices that count in the open round, or have reported the last version."""
        if self._finishing:
            return self._store.reported(self.fleet.rounds, "finished")
        if not self._method.exchanges:
            return self._store.reported(self._round, "trained")
        return {update.manifest.device for update in self._journal.committed(self._round)}

    def _waiting(self, counted: set[str]) -> set[str]:
        """Devices that a round waits for until its deadline: there, and neither counted nor failed."""
        failed = self._store.reported(min(self._round, self.fleet.rounds), "failed")
        return self._attendance.present - counted - failed

    def _missing(self, counted: set[str]) -> tuple[str, ...]:
        return tuple(sorted(self._attendance.known - counted))

    # --- the link

    def _serve(self) -> None:
        """Listen to devices, and open the round; on the first connection on which the node may serve."""
        fleet = self.fleet.name
        try:
            self._session.subscribe(topics.presence(fleet, topics.ANY), topics.report(fleet, topics.ANY))
            self._receiver.start()
            self._publisher.start()
        except BrokerError as error:
            raise UnreachableError(str(error)) from error
        self._serving = True
        self._open_round()

    def _handle(self, item: Message | Event | None) -> None:
        self._clock.handle(item)
        if isinstance(item, Connected) and not self._serving:
            self._serve()
        self._announcer.handle(item)
        complete = self._receiver.handle(item)
        if complete is not None:
            self._take_update(complete)
        self._publisher.handle(item)
        if self._publisher.outgrown:
            self._announce()
        try:
            for news in self._attendance.handle(item):
                self._say("presence", text=news)
            # an operator who forgets a device publishes an empty report
            if isinstance(item, Message) and item.payload and topics.parse(item.topic).kind == "report":
                self._take_report(item)
        except BadMessage as error:
            log.warning("ignored a message: %s", error)

    def _take_report(self, message: Message) -> None:
        """Store a device's report; raises BadMessage if it is not the device's, or of no round."""
        device = topics.parse(message.topic).device
        body, key = signing.open(message.payload, REPORT_DOMAIN, self._store.key(device))
        report = messages.decode(body, Report)
        if report.node_key != signing.public_key(self._key):
            log.info("%s reports to an earlier node of this name", device)
            return
        if report.device != device:
            raise BadMessage(f"{device} sent a report of {report.device}")
        if not 1 <= report.round <= self.fleet.rounds:
            raise BadMessage(
                f"{device} reports round {report.round}, this fleet has 1 to {self.fleet.rounds}"
            )
        self._store.add_report(report, key)
        self._attendance.vouch(device, report.process)
        if report.state == "failed":
            self._say("failed", text=f"{device}: {failure(report)}")

    def _take_update(self, complete: Update) -> None:
        """Check an update that has arrived, commit or refuse it, and answer the device."""
        manifest = complete.manifest
        try:
            expected = self._store.shapes(manifest.model_class)
            delta = self._exchange.check(complete.payload.read_bytes(), expected, self.fleet, self._method)
        except InputError as error:
            self._receiver.reject(manifest.transfer, str(error))
            self._say("refused", text=f"{manifest.device}: {error}")
            return
        shapes = {key: value.shape for key, value in delta.items()}
        self._receiver.commit(
            manifest.transfer, lambda: self._store.learn_shapes(manifest.model_class, shapes)
        )
        self._say("received", text=f"{manifest.device}: {manifest.size} bytes")

    def _say(self, phase: str, text: str = "", seconds: float = 0.0) -> None:
        counted = self._counted()
        round_ = min(self._round, self.fleet.rounds)
        self._tell(NodeEvent(round_, phase, text, tuple(sorted(counted)), self._missing(counted), seconds))
