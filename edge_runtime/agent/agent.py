"""The agent: waits for rounds, plans, has them trained, and hands the delta to the node.

    round announced ─> plan ─> fetch the global version ─> trainer ─> outbox ─> receipt ─> report

Everything that happens, from the broker, the trainer or a helper thread, comes through the session's one queue, so the
agent is one loop without locks. What must survive a kill is in SQLite before it is acted on: a restarted agent offers a
delta it owes again, and trains a round again whose result was not complete.
"""

import hashlib
import logging
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec
from edge_broker import messages, signing, topics
from edge_broker.errors import BadMessage
from edge_broker.errors import LinkError as BrokerError
from edge_broker.outbox import Outbox
from edge_broker.presence import PresenceSpec
from edge_broker.session import Connected, Message, Own, Session
from edge_broker.session import Event as LinkEvent
from edge_broker.transfer import Committed, Failed, Fetched, Fetcher, Rejected, Uploader

from edge_runtime import processes
from edge_runtime.agent.store import Store
from edge_runtime.agent.trainer import Ended, Trainer
from edge_runtime.errors import BudgetError, EdgeError, InputError, LinkError, TrainerError
from edge_runtime.models.facts import Facts
from edge_runtime.planning.plan import Plan
from edge_runtime.planning.search import choose
from edge_runtime.rounds import REPORT_DOMAIN, ROUND_DOMAIN, Report, Round
from edge_runtime.settings import Fleet
from edge_runtime.training import data
from edge_runtime.training.job import Job, Progress, Result

log = logging.getLogger(__name__)
ATTEMPTS = 3  # trainer processes a round
SMALLER = 0.8  # of the peak predicted for a plan that was killed: the next one's budget
CODEC = "int8-block64-zstd"
NOOP = "noop"


class Options(NamedTuple):
    """What a device is given. evaluation: held-out files by name. noop_bytes: send that much instead of training."""

    broker: str
    fleet: str
    id: str
    data: Path
    state: Path
    budget_bytes: int
    evaluation: dict[str, Path]
    models: Path
    threads: int
    device: str
    wait_s: float
    until_finished: bool
    noop_bytes: int


class Event(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the agent tells whoever watches it: one line of its log, or of `--json`."""

    device: str
    round: int
    phase: str
    step: int = 0
    steps: int = 0
    loss: float | None = None
    memory_bytes: int = 0
    budget_bytes: int = 0
    text: str = ""


class Planned(NamedTuple):
    """A helper thread's word: the plan of a round, or why there is none."""

    round: int
    plan: Plan | None
    facts: Facts | None
    error: EdgeError | None


class Agent:
    """One device. `run` returns when the fleet has finished, or never."""

    def __init__(self, options: Options, tell: Callable[[Event], None]) -> None:
        """Check the data and open the state; nothing is sent yet.

        Raises:
            InputError: the data or a held-out file cannot be used.
        """
        self.options, self._tell = options, tell
        self._work = options.state / "work"
        self._files = self._prepare_data()
        self._store = Store(options.state / "agent.db")
        self._key = signing.load_or_create_key(options.state / "device.key")
        self._outbox = Outbox(self._store.connection, options.state / "outbox")
        spec = PresenceSpec(options.fleet, options.id, int(self._store.get("epoch") or 0))
        self._session = Session(options.broker, f"{options.fleet}-{options.id}", presence=spec)
        self._uploader = Uploader(self._session, self._outbox, options.fleet, options.id, self._key, self._settled)
        self._fetcher = Fetcher(self._session, options.fleet, options.id, options.state / "versions")
        self._round: Round | None = None
        self._plan: Plan | None = None
        self._facts: Facts | None = None
        self._trainer: Trainer | None = None
        self._attempt = 0
        self._budget_bytes = options.budget_bytes
        self._planned_for: tuple[Fleet, int] | None = None
        self._began = (0, 0)  # traffic at the start of the round
        self._finished = False
        self._ignored = ""  # why a round that was announced does not count

    def run(self) -> None:
        """Take part in the fleet.

        Raises:
            LinkError: no broker, or no round was announced in time.
            EdgeError: this device cannot take part: the data, every model, or every plan failed.
        """
        try:
            self._connect()
            deadline = time.monotonic() + self.options.wait_s
            while not self._finished:
                if self._round is None and time.monotonic() > deadline:
                    raise LinkError(self._no_round())
                due_s = min(self._uploader.tick(), self._fetcher.tick(), 5.0)
                self._handle(self._session.receive(due_s))
        finally:
            if self._trainer:
                self._trainer.stop()
            self._session.close()
            self._store.connection.close()

    # --- the loop's parts

    def _connect(self) -> None:
        try:
            self._session.connect(15.0)
            self._session.subscribe(topics.round(self.options.fleet))
            self._uploader.start()
        except BrokerError as error:
            raise LinkError(str(error)) from error
        self._say("connected", text=self.options.broker)

    def _handle(self, item: Message | LinkEvent | None) -> None:
        if isinstance(item, Own):
            self._handle_own(item.item)
            return
        settled = self._uploader.handle(item)
        if settled is not None:
            self._after_transfer(settled)
        fetched = self._fetcher.handle(item)
        if isinstance(fetched, Fetched):
            self._train(fetched.path)
        elif isinstance(fetched, Failed):
            self._fail(fetched.reason)
        if isinstance(item, Connected):
            self._store.set("epoch", str(item.epoch))
            self._publish_owed()
        elif isinstance(item, Message) and item.topic == topics.round(self.options.fleet):
            self._on_round(item.payload)

    def _handle_own(self, item: object) -> None:
        """What this device's own threads and trainer say."""
        if isinstance(item, Planned):
            self._on_plan(item)
        elif isinstance(item, Progress):
            self._say(item.phase, item.step, item.steps, item.loss, item.memory_bytes)
        elif isinstance(item, Ended):
            self._on_ended(item)

    def _on_round(self, payload: bytes) -> None:
        try:
            body, key = signing.open(payload, ROUND_DOMAIN, self._store.get("node_key"))
            announced = messages.decode(body, Round)
        except BadMessage as error:
            log.warning("ignored a round: %s", error)
            self._ignored = f"a round was announced, but {error}; to trust that node, start with a new --state"
            return
        self._store.set("node_key", key)
        if self._round is not None and (announced.state, announced.round) == (self._round.state, self._round.round):
            return
        if self._trainer:  # the fleet went on without us
            self._trainer.stop()
            self._trainer = None
        self._round, self._attempt = announced, 0
        traffic = self._session.traffic
        self._began = (traffic.bytes_up, traffic.bytes_down)
        self._publish_owed()
        if announced.state == "open" and int(self._store.get("round") or 0) >= announced.round:
            self._say("waiting", text="this round is trained already")
            return
        if self.options.noop_bytes:
            self._join()
            self._fetch(NOOP)
        else:
            self._say("planning")
            self._in_background(announced)

    def _in_background(self, announced: Round) -> None:
        """Plan in a thread: a model may have to be fetched first, and the broker wants to hear of us meanwhile."""
        fleet, budget = announced.fleet, self._budget_bytes
        if self._plan is not None and self._facts is not None and self._planned_for == (fleet, budget):
            self._on_plan(Planned(announced.round, self._plan, self._facts, None))
            return
        self._planned_for = (fleet, budget)

        def plan() -> None:
            try:
                sources = {model.source for model in fleet.catalog}
                facts = {source: processes.prepared(source, self.options.models) for source in sources}
                fits = choose(fleet, facts, budget, processes.runtime_bytes()).fits
                self._session.put(Planned(announced.round, fits, facts[fits.source], None))
            except EdgeError as error:
                self._session.put(Planned(announced.round, None, None, error))
            except Exception as error:  # whatever it is, the loop has to hear of it
                log.exception("planning failed")
                self._session.put(Planned(announced.round, None, None, EdgeError(f"planning failed: {error}")))

        threading.Thread(target=plan, name="plan", daemon=True).start()

    def _on_plan(self, planned: Planned) -> None:
        if self._round is None or planned.round != self._round.round:
            return
        if planned.plan is None:
            assert planned.error is not None
            self._give_up(planned.error)
            return
        self._plan, self._facts = planned.plan, planned.facts
        self._join()
        self._fetch(planned.plan.model_class)

    def _join(self) -> None:
        """Say what this device will train; the node pins the key of a device's first report."""
        self._publish(self._report("joined", None))

    def _fetch(self, model_class: str) -> None:
        """Get the global version the round starts from, then go on with `_train`."""
        assert self._round is not None
        version = self._round.versions.get(model_class)
        if version is None:
            self._train(None)
            return
        self._say("fetching", text=f"{version.size} bytes")
        fetched = self._fetcher.fetch(version)
        if fetched is not None:
            self._train(fetched.path)

    def _train(self, start: Path | None) -> None:
        """Start the round's job: from the global version in `start`, or from version 0."""
        if self.options.noop_bytes:
            self._noop()
            return
        assert self._round is not None and self._plan is not None and self._facts is not None
        fleet = self._round.fleet
        job = Job(
            train=self._round.state == "open",
            facts=self._facts,
            plan=self._plan,
            adapter=fleet.adapter,
            training=fleet.training,
            method=fleet.method.name,
            seed=fleet.seed,
            round=self._round.round,
            rounds=fleet.rounds,
            data=str(self._files.data),
            evaluation={name: str(path) for name, path in self._files.evaluation.items()},
            start=str(start) if start else None,
            private=self._store.get("private"),
            residual=self._store.get("residual"),
            unsent=self._store.get("unsent"),
            threads=self.options.threads,
            device=self.options.device,
        )
        self._attempt += 1
        name = f"round-{self._round.round}" if job.train else "finished"
        self._trainer = Trainer(job, self._work / name, self._session.put)
        self._say("starting", text=_summary(self._plan))

    def _on_ended(self, ended: Ended) -> None:
        if self._trainer is None or self._round is None:
            return  # killed because the fleet went on
        self._trainer = None
        written = ended.folder / "result.json"
        if ended.exit_code == 0 and written.exists():
            result = msgspec.json.decode(written.read_bytes(), type=Result)
            if self._round.state == "open":
                self._keep(ended.folder, result)
            else:
                self._finish(result)
            return
        reason = ended.reason or f"the trainer ended with exit code {ended.exit_code}"
        if ended.exit_code == InputError.exit_code:
            self._give_up(InputError(reason))
            return
        if self._attempt >= ATTEMPTS:
            self._give_up(TrainerError(reason))
            return
        if ended.exit_code == -9 and self._plan is not None:  # out of memory, most likely: plan smaller
            self._budget_bytes = min(self._budget_bytes, int(SMALLER * self._plan.predicted_peak_bytes))
        self._say("again", text=reason)
        self._in_background(self._round)

    # --- what a round leaves behind

    def _keep(self, folder: Path, result: Result) -> None:
        """Keep a trained round: from here on it is owed to the node, whatever happens to this process."""
        assert self._round is not None and self._plan is not None
        payload = folder / "payload.bin" if result.payload_bytes else None
        with self._outbox.transaction():
            if (folder / "state.bin").exists():
                self._store.set("private", str(folder / "state.bin"))
            self._owe(payload, CODEC, result.samples, result)
        self._say("sending" if payload else "waiting", text=f"{result.payload_bytes} bytes")
        if not payload:
            self._tidy()
            self._publish_owed()

    def _owe(self, payload: Path | bytes | None, codec: str, samples: int, result: Result | None) -> None:
        assert self._round is not None
        self._store.set("round", str(self._round.round))
        self._store.set("report", msgspec.json.encode(self._report("trained", result)).decode())
        if payload:
            manifest = messages.describe(
                payload,
                fleet=self.options.fleet,
                device=self.options.id,
                round=self._round.round,
                model_class=self._plan.model_class if self._plan else NOOP,
                codec=codec,
                samples=samples,
                chunk_bytes=self._session.chunk_bytes,
                attempt=max(self._attempt, 1),
            )
            self._outbox.add(manifest, payload)

    def _settled(self, settled: Committed | Rejected, _: object) -> None:
        """In the transaction that settles a transfer: error feedback goes on from what the node took, or did not take."""
        folder = self._work / f"round-{settled.manifest.round}"
        if (folder / "residual.bin").exists():
            self._store.set("residual", str(folder / "residual.bin"))
            self._store.set("unsent", None if isinstance(settled, Committed) else str(folder / "payload.bin"))

    def _after_transfer(self, settled: Committed | Rejected) -> None:
        if isinstance(settled, Committed):
            self._say("waiting", text=f"the node took round {settled.manifest.round}")
            self._tidy()
            self._publish_owed()
        elif settled.final:
            self._say("rejected", text=settled.reason)
            owed = self._store.get("report")
            if owed and msgspec.json.decode(owed, type=Report).round == settled.manifest.round:
                self._store.set("report", None)  # it said that the node took this round
            report = self._report("failed", None, settled.reason)
            self._publish(msgspec.structs.replace(report, round=settled.manifest.round))

    def _tidy(self) -> None:
        """Delete what earlier rounds left, but for what the next one needs or the node has not taken yet."""
        needed = {
            Path(path).parent.name for name in ("private", "residual", "unsent") if (path := self._store.get(name))
        }
        needed |= {f"round-{manifest.round}" for manifest in self._outbox.pending()}
        for folder in self._work.glob("round-*"):
            if folder.name not in needed:
                shutil.rmtree(folder, ignore_errors=True)

    def _finish(self, result: Result | None) -> None:
        self._store.set("report", msgspec.json.encode(self._report("finished", result)).decode())
        self._publish_owed()
        self._say("finished")
        self._finished = self.options.until_finished

    # --- telling

    def _report(
        self, state: Literal["joined", "trained", "failed", "finished"], result: Result | None, reason: str = ""
    ) -> Report:
        assert self._round is not None
        return Report(
            device=self.options.id,
            round=self._round.round,
            state=state,
            budget_bytes=self.options.budget_bytes,
            plan=self._plan,
            result=result,
            reason=reason,
        )

    def _fail(self, reason: str) -> None:
        """This round goes on without us; the node need not wait."""
        self._say("failed", text=reason)
        self._publish(self._report("failed", None, reason))

    def _give_up(self, error: EdgeError) -> None:
        """Fail the round; end the agent too where the next round would fail alike, or nobody would wait for one."""
        self._fail(str(error))
        if self.options.until_finished or isinstance(error, (BudgetError, InputError)):
            raise error

    def _publish_owed(self) -> None:
        """Publish the report that is kept for the end of a round, once the node has taken what the round made."""
        owed = self._store.get("report")
        if owed and not self._outbox.pending() and self._publish(msgspec.json.decode(owed, type=Report)):
            self._store.set("report", None)

    def _publish(self, report: Report) -> bool:
        """Publish a report with the round's traffic; False where it did not get through."""
        traffic = self._session.traffic
        report = msgspec.structs.replace(
            report, bytes_up=traffic.bytes_up - self._began[0], bytes_down=traffic.bytes_down - self._began[1]
        )
        signed = signing.sign(self._key, REPORT_DOMAIN, msgspec.json.encode(report)).encode()
        try:
            self._session.publish(topics.report(self.options.fleet, self.options.id), signed, retain=True)
        except BrokerError as error:
            log.warning("the report of round %s did not get through: %s", report.round, error)
            return False
        return True

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

    def _no_round(self) -> str:
        if self._ignored:
            return self._ignored
        self._session.subscribe(topics.round("+"))
        seen = set()
        while isinstance(item := self._session.receive(1.0), Message):
            seen.add(topics.parse(item.topic).fleet)
        there = f"fleets on this broker: {', '.join(sorted(seen))}" if seen else "no fleet is announced on this broker"
        return (
            f"no round of fleet `{self.options.fleet}` was announced at {self.options.broker} within {self.options.wait_s:g} s; "
            f"{there}; check --fleet, or start `edge-runtime aggregator` there"
        )

    # --- data, and the benchmark's round without training

    def _prepare_data(self) -> "_Files":
        if self.options.noop_bytes:
            return _Files(self.options.data, {})
        rows = data.read_rows(self.options.data)
        for path in self.options.evaluation.values():
            data.read_rows(path)
        if self.options.evaluation:
            return _Files(self.options.data, self.options.evaluation)
        train, held_out = data.split(rows, seed=0)
        self._work.mkdir(parents=True, exist_ok=True)
        if not held_out:
            return _Files(self.options.data, {})
        return _Files(
            data.write_rows(self._work / "train.jsonl", train),
            {"own": data.write_rows(self._work / "own.jsonl", held_out)},
        )

    def _noop(self) -> None:
        assert self._round is not None
        if self._round.state == "finished":
            self._finish(None)
            return
        seed = hashlib.sha256(f"{self.options.id}/{self._round.round}".encode()).digest()
        noise = hashlib.shake_256(seed).digest(self.options.noop_bytes)
        with self._outbox.transaction():
            self._owe(noise, NOOP, 1, None)


class _Files(NamedTuple):
    data: Path
    evaluation: dict[str, Path]


def _summary(plan: Plan) -> str:
    return f"{Path(plan.source).name}, {plan.depth} of {plan.layers} layers, {plan.weights}, micro-batch {plan.rows}"
