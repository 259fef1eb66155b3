"""The aggregator: announces rounds, takes in updates, closes a round, merges, publishes the next global version.

    announced -> collecting -> (quorum and (all online devices in, or deadline)) -> merging -> published -> next

One loop over the session's queue. Store and journal share a SQLite file, so an aggregator that was killed goes on in the
same round with every committed update; a merge that was cut short is done again from the journal.
"""

import hashlib
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec
from edge_broker import messages, presence, signing, topics
from edge_broker.address import Address
from edge_broker.errors import BadMessage
from edge_broker.errors import LinkError as BrokerError
from edge_broker.journal import Journal
from edge_broker.messages import Artifact, Manifest
from edge_broker.session import Connected, Disconnected, Message, Session, Unsent
from edge_broker.session import Event as LinkEvent
from edge_broker.transfer import Complete, Publisher, Receiver

from edge_runtime import methods
from edge_runtime.aggregator import anchors, merge
from edge_runtime.aggregator.store import Store, Version
from edge_runtime.errors import EdgeError, InputError, LinkError
from edge_runtime.protocol.report import REPORT_DOMAIN, Report, failure
from edge_runtime.protocol.round import CODEC, FLEET, NOOP, ROUND_DOMAIN, Round
from edge_runtime.settings import Fleet
from edge_runtime.trainer import data

log = logging.getLogger(__name__)
LARGEST_PAYLOAD_BYTES = 1 << 30
OFFLINE_S = 60.0  # between two looks at the time while there is no broker
KEPT_ROUNDS = 10  # whose versions stay in the state folder, for whoever looks back
GREETING_S = 1.0  # after connecting: who is there has to be heard before a round may close without them


class Options(NamedTuple):
    """What a node is given. noop: take any payload and send as much back, for benchmarks of the link alone."""

    broker: Address
    state: Path
    node: str
    until_finished: bool
    noop: bool


class Event(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the node tells whoever watches it. in_: devices that count in the round; missing: seen, but not in."""

    round: int
    phase: str
    text: str = ""
    in_: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    seconds: float = 0.0


class Node:
    """One fleet's node. `run` returns when all rounds are merged and reported, or never."""

    def __init__(self, fleet: Fleet, options: Options, tell: Callable[[Event], None]) -> None:
        """Open the state; nothing is sent yet.

        Raises:
            InputError: the fleet's method is not known, or cannot merge the ranks its devices may take; its public texts
                cannot be read; or the state was made with other settings.
        """
        self.fleet, self.options, self._tell = fleet, options, tell
        self._method = methods.of(fleet)
        self._store = Store(options.state / "node.db")
        self._journal = Journal(self._store.connection, options.state)
        texts = anchors.read(fleet)
        self._check_settings(texts)
        self._texts = data.write_rows(options.state / "anchors.jsonl", texts) if texts else None
        self._key = signing.load_or_create_key(options.state / "node.key")
        name = topics.client_id("node", fleet.name, options.node)
        self._session = Session(options.broker, name, session_expiry_s=0)
        self._receiver = Receiver(
            self._session, self._journal, fleet.name, options.node, self._check_manifest, self._store.key
        )
        self._publisher = Publisher(self._session, fleet.name)
        self._presence = presence.Tracker()
        self._round = self._store.open_round()
        self._served: dict[str, Artifact] = {}
        self._deadline = self._greeted = 0.0
        self._offline_since: float | None = None  # an outage does not count against the deadline
        self._announced = b""
        self._unsaid = False  # the round has not been handed to the connection yet
        self._finished = False

    def run(self) -> None:
        """Serve the fleet.

        Raises:
            LinkError: there is no broker.
            EdgeError: a round stayed below its quorum through all its extensions.
        """
        try:
            self._connect()
            self._end_earlier_rounds()
            self._announce()
            self._greeted = time.monotonic() + GREETING_S
            while not self._finished:
                due_s = min(self._receiver.tick(), self._publisher.tick(), self._next_s())
                item = self._session.receive(max(due_s, 0.0))
                if self._unsaid:  # before a chunk takes the room that has come free
                    self._publish_round()
                self._handle(item)
                if self._offline_since is None and time.monotonic() >= self._greeted:
                    self._close_if_due()
        finally:
            self._session.close()
            self._store.connection.close()

    def _check_settings(self, texts: list[data.Row]) -> None:
        """Versions and updates of earlier rounds do not fit a fleet file that says otherwise what they are made of."""
        fleet, public = self.fleet, self.fleet.codistill
        fixed = {
            "[method]": fleet.method,
            "[adapter]": msgspec.structs.replace(fleet.adapter, lower=()),
            "[head]": fleet.head,
            "[codistill] texts and across": (public.texts, public.across) if public is not None else None,
            "[codistill] anchors": hashlib.sha256(msgspec.json.encode(texts)).hexdigest()[
                :12
            ],  # told by number
            "[fleet] seed": fleet.seed,
        }
        values = {name: msgspec.json.encode(value).decode() for name, value in fixed.items()}
        before = self._store.fixed()
        if self._store.open_round() == 1 and not self._journal.committed(1):
            self._store.fix(values)
        elif changed := [name for name, value in values.items() if before.get(name, value) != value]:
            raise InputError(
                f"{self.options.state} was made with another {', '.join(changed)}: `{before[changed[0]]}`, now "
                f"`{values[changed[0]]}`; put that back into the fleet file, or start anew with another --state"
            )

    # --- the loop's parts

    def _connect(self) -> None:
        fleet = self.fleet.name
        try:
            self._session.connect(15.0)
            self._session.subscribe(topics.all_presence(fleet), topics.all_reports(fleet))
            self._receiver.start()
            self._publisher.start()
        except BrokerError as error:
            raise LinkError(str(error)) from error

    def _next_s(self) -> float:
        """Seconds until a round may close."""
        if self._offline_since is not None:
            return OFFLINE_S
        now = time.monotonic()
        return (self._greeted if now < self._greeted else self._deadline) - now

    def _announce(self) -> None:
        """Serve the current versions and say what round is open."""
        versions = self._store.versions()
        for digest in {artifact.digest for artifact in self._served.values()}:
            self._publisher.withdraw(digest)
        public = self._publisher.serve(self._texts) if self._texts is not None else None
        self._served = {name: self._publisher.serve(version.artifact) for name, version in versions.items()}
        done = self._round > self.fleet.rounds
        announced = Round(
            node=self.options.node,
            state="finished" if done else "open",
            round=min(self._round, self.fleet.rounds),
            fleet=_told(self.fleet),
            versions=self._served,
            anchors=public,
        )
        self._announced = signing.sign(self._key, ROUND_DOMAIN, msgspec.json.encode(announced)).encode()
        self._publish_round()
        self._deadline = time.monotonic() + self.fleet.deadline_s
        self._say("finishing" if done else "collecting")

    def _publish_round(self) -> None:
        """Hand it over without waiting for the broker's word: an outage has to be heard of while it lasts."""
        try:
            self._unsaid = not self._session.publish_nowait(
                topics.round(self.fleet.name), self._announced, retain=True
            )
        except BrokerError as error:
            raise LinkError(str(error)) from error

    def _back_online(self) -> None:
        """Announce again, as the broker may have lost its memory, and hear who is there before a round closes."""
        now = time.monotonic()
        self._deadline += now - (self._offline_since or now)
        self._greeted = now + GREETING_S
        self._offline_since = None
        self._publish_round()

    def _handle(self, item: Message | LinkEvent | None) -> None:
        complete = self._receiver.handle(item)
        if complete is not None:
            self._take(complete)
        self._publisher.handle(item)
        if isinstance(item, Disconnected):
            self._offline_since = self._offline_since or time.monotonic()
        elif isinstance(item, Connected):
            self._back_online()
        elif isinstance(item, Unsent) and item.topic == topics.round(self.fleet.name):
            raise LinkError(f"the round cannot be announced on {item.topic}: {item.reason}")
        if not isinstance(item, Message):
            return
        try:
            changed = self._presence.handle(item.topic, item.payload)
            if changed is not None:
                self._say("presence", text=f"{changed} is {self._presence.state(changed)}")
            elif topics.parse(item.topic).kind == "report":
                self._take_report(item)
        except BadMessage as error:
            log.warning("ignored a message: %s", error)

    def _check_manifest(self, manifest: Manifest) -> str | None:
        """Why an update is not wanted, before any of its bytes are taken."""
        if self._round > self.fleet.rounds:
            return f"the fleet has finished its {self.fleet.rounds} rounds"
        if manifest.model_class in ("", FLEET):
            return f"`{manifest.model_class}` is no model class"
        if manifest.round != self._round:
            return f"round {manifest.round} is closed; round {self._round} is open"
        if not self.options.noop and manifest.codec != CODEC:
            return f"the codec {manifest.codec} is not known; needed: {CODEC}"
        if manifest.size > LARGEST_PAYLOAD_BYTES:
            return f"{manifest.size} bytes are more than the {LARGEST_PAYLOAD_BYTES} a node takes"
        most = self.fleet.training.steps * self.fleet.training.rows_a_step
        if not 1 <= manifest.samples <= most:
            return f"the manifest has {manifest.samples} samples, which weigh its mean, but a round has 1 to {most}"
        return None

    def _take(self, complete: Complete) -> None:
        """Check what arrived, then commit it or refuse it; both are answered to the device."""
        manifest = complete.manifest
        shapes: dict[str, tuple[int, ...]] = {}
        if not self.options.noop:
            known = self._store.shapes(manifest.model_class)
            try:
                delta = merge.check(complete.payload.read_bytes(), known, self.fleet, self._method)
            except InputError as error:
                self._receiver.reject(manifest.transfer, str(error))
                self._say("refused", text=f"{manifest.device}: {error}")
                return
            shapes = {key: value.shape for key, value in delta.items()}
        self._receiver.commit(
            manifest.transfer, lambda _: self._store.learn_shapes(manifest.model_class, shapes)
        )
        self._say("received", text=f"{manifest.device}: {manifest.size} bytes")

    def _take_report(self, message: Message) -> None:
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
        self._store.pin(device, key)
        self._store.add_report(report)
        if report.state == "failed":
            self._say("failed", text=f"{device}: {failure(report)}")

    # --- closing a round

    def _in(self) -> set[str]:
        """Devices that count in the open round, or have reported after the last one."""
        if self._round > self.fleet.rounds:
            return self._store.reported(self.fleet.rounds, "finished")
        if not self._method.exchanges and not self.options.noop:
            return self._store.reported(self._round, "trained")
        return {update.manifest.device for update in self._journal.committed(self._round)}

    def _waiting(self) -> set[str]:
        """Devices that are online and neither in nor failed: a round waits for them until its deadline."""
        online = {device for device, seen in self._presence.devices.items() if seen.state == "online"}
        failed = self._store.reported(min(self._round, self.fleet.rounds), "failed")
        return online - self._in() - failed

    def _close_if_due(self) -> None:
        late = time.monotonic() >= self._deadline
        inside, waiting = self._in(), self._waiting()
        if self._round > self.fleet.rounds:
            if self.options.until_finished and (late or (len(inside) >= self.fleet.quorum and not waiting)):
                self._say("finished")
                self._finished = True
            return
        if len(inside) >= self.fleet.quorum and (late or not waiting):
            self._merge()
        elif late:
            self._extend(inside)

    def _merge(self) -> None:
        started = time.monotonic()
        self._say("merging")
        updates = self._journal.committed(self._round)
        versions: list[Version] = []
        if self.options.noop:
            versions = [Version(NOOP, updates[-1].payload, updates[-1].payload)]
        elif updates:
            folder = self.options.state / "versions"
            versions = merge.merge(
                updates, self._store.versions(), self.fleet, self._method, self._round, folder
            )
        self._store.merged(self._round, versions)
        self._say("merged", seconds=time.monotonic() - started)
        self._round += 1
        self._end_earlier_rounds()
        self._announce()

    def _end_earlier_rounds(self) -> None:
        """Refuse what is incomplete of rounds that are merged, and delete what was: what a kill may have kept us from."""
        for manifest in self._journal.open_transfers():
            if manifest.round < self._round:
                reason = f"round {manifest.round} was closed before it was complete"
                self._receiver.reject(manifest.transfer, reason, "late")
        if not self.options.noop:
            self._journal.release(self._round - 1)
            self._store.forget_versions(self._round - KEPT_ROUNDS)

    def _extend(self, inside: set[str]) -> None:
        used = self._store.extensions(self._round)
        if used >= self.fleet.extensions:
            raise EdgeError(
                f"round {self._round} has {len(inside)} of the {self.fleet.quorum} updates of its quorum after "
                f"{used + 1} deadlines of {self.fleet.deadline_s:g} s; missing: {', '.join(self._missing()) or 'unknown devices'}"
            )
        self._store.extend(self._round)
        self._deadline = time.monotonic() + self.fleet.deadline_s
        self._say("extended", text=f"below the quorum of {self.fleet.quorum}")

    def _missing(self) -> tuple[str, ...]:
        return tuple(sorted(set(self._presence.devices) - self._in()))

    def _say(self, phase: str, text: str = "", seconds: float = 0.0) -> None:
        round_ = min(self._round, self.fleet.rounds)
        self._tell(Event(round_, phase, text, tuple(sorted(self._in())), self._missing(), seconds))


def _told(fleet: Fleet) -> Fleet:
    """The fleet as devices hear of it: without where the node has its files."""
    if fleet.codistill is None:
        return fleet
    name = Path(fleet.codistill.anchors).name
    return msgspec.structs.replace(fleet, codistill=msgspec.structs.replace(fleet.codistill, anchors=name))
