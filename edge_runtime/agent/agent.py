"""The agent: waits for rounds, plans, has them trained, and hands the delta to the node.

    round announced ─> plan ─> fetch the global version ─> trainer ─> outbox ─> receipt ─> report

Everything that happens, from the broker, the trainer or the planning thread, comes through the session's one queue, so the
agent is one loop without locks. What must survive a kill is in SQLite before it is acted on: a restarted agent offers a
delta it owes again, and trains a round again whose result was not complete.
"""

import hashlib
import logging
import math
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Literal

import msgspec
from edge_broker import messages, signing, topics
from edge_broker.errors import BadMessage, WrongKey
from edge_broker.errors import LinkError as BrokerError
from edge_broker.messages import Artifact
from edge_broker.outbox import Outbox
from edge_broker.presence import PresenceSpec
from edge_broker.session import Connected, Message, Own, Session
from edge_broker.session import Event as LinkEvent
from edge_broker.transfer import Committed, Failed, Fetched, Fetcher, Rejected, Uploader

from edge_runtime import methods
from edge_runtime.agent import planner, work
from edge_runtime.agent.options import Event, Options
from edge_runtime.agent.planner import Planned, Unplanned, Wanted
from edge_runtime.agent.reports import Reports
from edge_runtime.agent.store import Store
from edge_runtime.agent.trainer import TIMED_OUT, Ended, Trainer
from edge_runtime.errors import (
    BudgetError,
    DiskError,
    EdgeError,
    InputError,
    LinkError,
    MemoryShortError,
    TrainerError,
)
from edge_runtime.protocol.plan import Plan
from edge_runtime.protocol.report import Cause, Report, Result
from edge_runtime.protocol.round import CODEC, FLEET, NOOP, ROUND_DOMAIN, Round
from edge_runtime.trainer.job import Carried, Job, Machine, Progress

log = logging.getLogger(__name__)
ATTEMPTS = 3  # trainer processes a round
SMALLER = (
    0.8  # of what was predicted above the runtime for a plan that memory was short for: the next one's budget
)
CONNECT_TIMEOUT_S = 15.0
IDLE_S = 5.0
KILLED = -9  # exit code of a trainer that the system killed, most likely for memory
CAUSES: dict[int, Cause] = {
    KILLED: "memory",
    MemoryShortError.exit_code: "memory",
    DiskError.exit_code: "disk",
    TIMED_OUT: "time",
}


class Agent:
    """One device. `run` returns when the fleet has finished, or never."""

    def __init__(self, options: Options, tell: Callable[[Event], None]) -> None:
        """Check the data and open the state; nothing is sent yet.

        Raises:
            InputError: the data or a held-out file cannot be used, or the state is another device's.
        """
        self.options, self._tell = options, tell
        self._work, self._adapter = (options.state.resolve() / "work", options.state.resolve() / "adapter")
        given = (options.data, options.evaluation)
        self._rows = work.Rows(*given) if options.noop_bytes else work.check_rows(*given, self._work)
        self._store = Store(options.state / "agent.db")
        self._check_owner()
        key = signing.load_or_create_key(options.state / "device.key")
        spec = PresenceSpec(options.fleet, options.id, int(self._store.get("epoch") or 0))
        self._session = Session(
            options.broker, topics.client_id("device", options.fleet, options.id), presence=spec
        )
        self._outbox = Outbox(self._store.connection, options.state)
        self._reports = Reports(self._session, self._store, self._outbox, options.fleet, key)
        self._uploader = Uploader(self._session, self._outbox, options.fleet, options.id, key, self._settled)
        self._fetcher = Fetcher(self._session, options.fleet, options.id, options.state / "versions")
        self._round: Round | None = None
        self._node_key = ""  # of the node that announced it
        self._planned: Planned | None = None
        self._planning = False
        self._wanted: dict[
            str, Artifact
        ] = {}  # what the round starts from, and where what is here of it lies
        self._got: dict[str, Path] = {}
        self._interrupted = False  # fetching, by an outage
        self._starved = False  # what the round starts from could not be had
        self._introduced = 0  # the round whose update the node did not know our key for
        self._trainer: Trainer | None = None
        self._attempt = 0
        self._budget_bytes = options.budget_bytes
        self._fill = True  # the budget, with what only saves time
        self._finished = False
        self._patience = (
            math.inf
        )  # until when the node has to be heard of: a first round, its word after the last one
        self._ignored = ""  # why a round that was announced does not count

    def run(self) -> None:
        """Take part in the fleet.

        Raises:
            LinkError: no broker, or no round was announced in time.
            EdgeError: this device cannot take part: the data, every model, or every plan failed.
        """
        try:
            self._connect()
            self._patience = time.monotonic() + self.options.wait_s
            while not self._finished:
                due_s = min(
                    self._uploader.tick(), self._fetcher.tick(), IDLE_S, self._patience - time.monotonic()
                )
                self._handle(self._session.receive(max(due_s, 0.0)))
                if time.monotonic() >= self._patience:
                    raise LinkError(self._no_round() if self._round is None else self._no_word())
        finally:
            if self._trainer:
                self._trainer.stop()
            self._session.close()
            self._store.connection.close()

    def _check_owner(self) -> None:
        """What the state owes is signed for one device of one fleet."""
        for name, value in (("fleet", self.options.fleet), ("id", self.options.id)):
            before = self._store.get(name)
            if before not in (None, value):
                raise InputError(
                    f"{self.options.state} is that of {name} `{before}`, not `{value}`: give another --state, or "
                    f"--{name} {before}"
                )
            self._store.set(name, value)

    # --- the loop's parts

    def _connect(self) -> None:
        try:
            self._session.connect(CONNECT_TIMEOUT_S)
            self._session.subscribe(topics.round(self.options.fleet))
            self._uploader.start()
        except BrokerError as error:
            raise LinkError(str(error)) from error
        self._say("connected", text=str(self.options.broker))

    def _handle(self, item: Message | LinkEvent | None) -> None:
        if isinstance(item, Own):
            self._handle_own(item.item)
            return
        settled = self._uploader.handle(item)
        if settled is not None:
            self._after_transfer(settled)
        fetched = self._fetcher.handle(item)
        if isinstance(fetched, Fetched):
            named = {
                name: fetched.path
                for name, one in self._wanted.items()
                if one.digest == fetched.artifact.digest
            }
            self._fetch({**self._got, **named})
        elif isinstance(fetched, Failed):
            self._unfetched(fetched.reason)
        if isinstance(item, Connected):
            self._store.set("epoch", str(item.epoch))
            self._reports.publish_owed()
            if self._interrupted:
                self._fetch(self._got)
            elif self._starved:
                self._plan()
        elif isinstance(item, Message) and item.topic == topics.round(self.options.fleet):
            self._on_round(item.payload)

    def _handle_own(self, item: object) -> None:
        """What this device's own thread and trainer say."""
        if isinstance(item, Planned):
            self._planned, self._planning = item, False
            self._plan()  # begins, unless the fleet or the budget changed meanwhile
        elif isinstance(item, Unplanned):
            self._planning = False
            self._give_up(item.error, item.cause)
        elif isinstance(item, Progress):
            self._say(item.phase, item.step, item.steps, item.loss, item.memory_bytes)
        elif isinstance(item, Ended) and self._trainer and item.pid == self._trainer.pid:
            self._trainer = None
            self._on_ended(item)

    def _on_round(self, payload: bytes) -> None:
        try:
            body, key = signing.open(payload, ROUND_DOMAIN, self._store.get("node_key"))
            announced = messages.decode(body, Round)
        except BadMessage as error:
            log.warning("ignored a round: %s", error)
            advice = "; to trust that node, start with a new --state" if isinstance(error, WrongKey) else ""
            self._ignored = f"a round was announced, but {error}{advice}"
            return
        known = self._round and (self._node_key, self._round.state, self._round.round)
        if known == (key, announced.state, announced.round):
            if self._starved:  # its node is there again
                self._plan()
            return
        if self._trainer:  # the fleet went on without us
            self._trainer.stop()
            self._trainer = None
        self._fetcher.drop()
        self._interrupted = self._starved = False
        self._reports.publish_owed()
        self._reports.begin()
        self._round, self._node_key, self._attempt, self._patience = announced, key, 0, math.inf
        if announced.state == "open" and int(self._store.get("round") or 0) >= announced.round:
            self._say("waiting", text="this round is trained already")
        else:
            self._plan()

    # --- a round: plan, fetch, train

    def _plan(self) -> None:
        assert self._round is not None
        wanted = Wanted(self._round.fleet, self._budget_bytes, self._fill, self._most_rank())
        if self.options.noop_bytes or (self._planned and self._planned.wanted == wanted):
            self._begin()
            return
        self._say("planning")
        if self._planning:  # an earlier round's plan is on its way, and is this one's too
            return
        self._planning = True
        options = self.options
        planner.start(wanted, options.models, options.device, options.threads, self._session.put)

    def _most_rank(self) -> int | None:
        """To which the method has pruned this device; None: the fleet's ranks are open to it."""
        assert self._round is not None
        fleet, kept = self._round.fleet, self._store.get("rank")
        prunes = methods.build(fleet.method, fleet.head, fleet.codistill).pruned is not None
        return int(kept) if kept is not None and prunes and self._round.round > 1 else None

    def _begin(self) -> None:
        """Say what this device will train (the node pins the key of a first report), and get the global version."""
        assert self._round is not None
        self._starved = False
        self._reports.publish(self._report("joined", None))
        if self._outbox.pending():  # the next one builds on it, and a report of the end follows it
            self._uploader.offer_now()
            self._say("waiting", text="for the node's word on the last update")
            if self._round.state == "finished" and self.options.until_finished:
                self._patience = time.monotonic() + self.options.wait_s
            return
        versions = self._round.versions
        version = versions.get(self._planned.plan.model_class if self._planned else NOOP, versions.get(FLEET))
        wanted = {"start": version, "anchors": self._round.anchors}
        self._wanted = {name: artifact for name, artifact in wanted.items() if artifact is not None}
        work.forget_others(
            self.options.state / "versions", {artifact.digest for artifact in self._wanted.values()}
        )
        self._fetch({})

    def _fetch(self, got: dict[str, Path]) -> None:
        """Get what the round starts from, one file after another; then train."""
        self._got, self._interrupted = got, False
        for name, artifact in self._wanted.items():
            if name in got:
                continue
            self._say("fetching", text=f"{artifact.size} bytes")
            try:
                fetched = self._fetcher.fetch(artifact)
            except BrokerError as error:
                self._interrupted = not self._session.connected
                if self._interrupted:
                    log.warning("fetching waits for a connection: %s", error)
                else:
                    self._unfetched(str(error))
                return
            if fetched is None:
                return
            self._got[name] = fetched.path
        self._train()

    def _unfetched(self, reason: str) -> None:
        """What the round starts from cannot be had; after the last one nobody will announce another."""
        assert self._round is not None
        if self._round.state == "finished":
            self._give_up(LinkError(reason), "link")
        else:
            self._starved = True
            self._fail(reason, "link")

    def _train(self) -> None:
        """Start the round's job: from the global version, or from version 0 where there is none."""
        assert self._round is not None
        if self._planned is None:
            self._send_noise()
            return
        fleet, plan = self._round.fleet, self._planned.plan
        job = Job(
            train=self._round.state == "open",
            round=self._round.round,
            fleet=fleet,
            facts=self._planned.facts,
            plan=plan,
            data=str(self._rows.data),
            evaluation={name: str(path) for name, path in self._rows.evaluation.items()},
            depths=work.depths(fleet, plan),
            start=str(self._got["start"]) if "start" in self._got else None,
            anchors=str(self._got["anchors"]) if "anchors" in self._got else None,
            carried=Carried(
                private=work.current(self._work, self._store, "private"),
                residual=work.current(self._work, self._store, "residual"),
                unsent=work.current(self._work, self._store, "unsent"),
            ),
            machine=Machine(
                threads=self.options.threads,
                device=self.options.device,
                budget_bytes=self.options.budget_bytes,
                gpu_cap_bytes=self.options.gpu_cap_bytes,
            ),
            export=str(self._adapter) if self._round.state == "finished" else None,
        )
        self._attempt += 1
        folder = work.folder_of(self._work, job.round) if job.train else self._work / "finished"
        self._trainer = Trainer(job, folder, self._session.put)
        self._say("starting", text=plan.summary)

    def _on_ended(self, ended: Ended) -> None:
        assert self._round is not None and self._planned is not None
        written = ended.folder / "result.json"
        if ended.exit_code == 0 and written.exists():
            result = msgspec.json.decode(written.read_bytes(), type=Result)
            self._keep(ended.folder, result) if self._round.state == "open" else self._finish(result)
            return
        reason = ended.reason
        if ended.exit_code == InputError.exit_code:
            cause: Cause = "input" if work.readable(self._rows) else "data"
            self._give_up(InputError(reason), cause, ended.exit_code)
        elif self._attempt >= ATTEMPTS:
            cause = CAUSES.get(ended.exit_code, "trainer")
            self._give_up(TrainerError(reason), cause, ended.exit_code)
        else:
            if CAUSES.get(ended.exit_code) == "memory":
                self._take_less(self._planned.plan, ended.exit_code == KILLED)
            self._say("again", text=reason)
            self._plan()

    def _take_less(self, plan: Plan, killed: bool) -> None:
        """Plan what comes in less memory: a killed trainer's without what only saved time, or else a smaller one."""
        self._fill = False
        if killed and plan.kept_blocks:
            return  # a trainer that was not killed had tried to go on without
        runtime, peak = (plan.terms["runtime"], plan.predicted_peak_bytes - plan.terms.get("activations", 0))
        self._budget_bytes = min(self._budget_bytes, int(runtime + SMALLER * (peak - runtime)))

    def _send_noise(self) -> None:
        """The benchmark's round without training."""
        assert self._round is not None
        if self._round.state == "finished":
            self._finish(None)
            return
        seed = hashlib.sha256(f"{self.options.id}/{self._round.round}".encode()).digest()
        with self._outbox.transaction():
            self._owe(hashlib.shake_256(seed).digest(self.options.noop_bytes), NOOP, 1, None)

    # --- what a round leaves behind

    def _keep(self, folder: Path, result: Result) -> None:
        """Keep a trained round: from here on it is owed to the node, whatever happens to this process."""
        assert self._round is not None
        payload = folder / "payload.bin" if result.payload_bytes else None
        with self._outbox.transaction():
            work.keep_private(self._work, self._store, self._round.round)
            if self._round.round == 1:
                self._store.set("rank", None)
            if result.rank is not None and self._planned and result.rank < self._planned.plan.rank:
                self._store.set("rank", str(result.rank))
            self._owe(payload, CODEC, result.samples, result)
        self._say("sending" if payload else "waiting", text=f"{result.payload_bytes} bytes")
        if not payload:
            self._close_round()

    def _owe(self, payload: Path | bytes | None, codec: str, samples: int, result: Result | None) -> None:
        assert self._round is not None
        self._store.set("node_key", self._node_key)
        self._store.set("round", str(self._round.round))
        self._reports.owe(self._report("trained", result))
        if payload:
            manifest = messages.describe(
                payload,
                fleet=self.options.fleet,
                device=self.options.id,
                round=self._round.round,
                model_class=self._planned.plan.model_class if self._planned else NOOP,
                codec=codec,
                samples=samples,
                chunk_bytes=self._session.chunk_bytes,
                attempt=max(self._attempt, 1),
            )
            self._outbox.add(manifest, payload)

    def _settled(self, settled: Committed | Rejected, _: object) -> None:
        work.settle(self._work, self._store, settled)
        if isinstance(settled, Rejected) and settled.final:
            # After the last round the node waits for the report of the end alone.
            finished = self._round is not None and self._round.state == "finished"
            self._reports.refused(settled.manifest.round, tell=not finished)

    def _after_transfer(self, settled: Committed | Rejected) -> None:
        round_ = settled.manifest.round
        if isinstance(settled, Committed):
            self._say("waiting", text=f"the node took round {round_}")
            self._close_round()
        elif settled.final:
            self._say("rejected", text=settled.reason)
            self._reports.publish_owed()
        else:
            self._say("waiting", text=f"the node does not take round {round_} yet: {settled.reason}")
            if settled.code == "signature" and self._round is not None and self._introduced != round_:
                self._introduced = round_  # once: the report that tells it our key may be lost
                self._reports.publish(self._report("joined", None))
                self._uploader.offer_now()
            return
        if self._round is not None and (self._round.state == "finished" or round_ < self._round.round):
            self._patience = math.inf
            self._plan()  # it waited for this word

    def _close_round(self) -> None:
        self._reports.publish_owed()
        work.tidy(self._work, self._store, self._outbox)

    def _finish(self, result: Result | None) -> None:
        self._reports.owe(self._report("finished", result))
        self._reports.publish_owed()
        self._say("finished", text=f"the adapter is in {self._adapter}" if result else "")
        self._finished = self.options.until_finished

    # --- telling

    def _fail(self, reason: str, cause: Cause, exit_code: int | None = None) -> None:
        """Tell the node that the round goes on without this device; the sentence is for this device's screen alone."""
        self._say("failed", text=reason)
        failed = msgspec.structs.replace(self._report("failed", None), cause=cause, exit_code=exit_code)
        self._reports.publish(failed)

    def _give_up(self, error: EdgeError, cause: Cause, exit_code: int | None = None) -> None:
        """Fail the round; end the agent too where the next round would fail alike, or nobody would wait for one."""
        self._fail(str(error), cause, error.exit_code if exit_code is None else exit_code)
        if self.options.until_finished or isinstance(error, (BudgetError, InputError)):
            raise error

    def _report(
        self,
        state: Literal["joined", "trained", "failed", "finished"],
        result: Result | None,
    ) -> Report:
        return Report(
            device=self.options.id,
            node_key=self._node_key,
            round=self._round.round if self._round else 0,
            state=state,
            budget_bytes=self.options.budget_bytes,
            plan=self._planned.plan if self._planned else None,
            result=result,
        )

    def _say(
        self,
        phase: str,
        step: int = 0,
        steps: int = 0,
        loss: float | None = None,
        memory_bytes: int = 0,
        text: str = "",
    ) -> None:
        round_ = self._round.round if self._round else 0
        budget = self.options.budget_bytes
        self._tell(Event(self.options.id, round_, phase, step, steps, loss, memory_bytes, budget, text))

    def _no_word(self) -> str:
        return (
            f"fleet `{self.options.fleet}` has finished, but its node has not answered the last update within "
            f"{self.options.wait_s:g} s; the update is kept: start the agent again while `edge-runtime aggregator` runs"
        )

    def _no_round(self) -> str:
        if self._ignored:
            return self._ignored
        self._session.subscribe(topics.all_rounds())
        seen, until = set(), time.monotonic() + CONNECT_TIMEOUT_S
        while time.monotonic() < until and isinstance(item := self._session.receive(1.0), Message):
            with suppress(BadMessage):
                seen.add(topics.parse(item.topic).fleet)
        there = (
            f"fleets on this broker: {', '.join(sorted(seen))}"
            if seen
            else "no fleet is announced on this broker"
        )
        return (
            f"no round of fleet `{self.options.fleet}` was announced at {self.options.broker} within "
            f"{self.options.wait_s:g} s; {there}; check --fleet, or start `edge-runtime aggregator` there"
        )
