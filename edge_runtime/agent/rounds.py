"""A device's rounds: each event of the link, the planner or the trainer moves the stage on."""

import logging
import math
import time
from collections.abc import Callable
from typing import Literal

import msgspec
from edge_broker import signing
from edge_broker.errors import BrokerError
from edge_broker.session import Connected, Event, Message, Own, Session
from edge_broker.transfer import Committed, Failed, Fetched, Fetcher, Rejected

from edge_runtime.agent import rows, stages
from edge_runtime.agent.deliveries import Deliveries
from edge_runtime.agent.local_round import DeviceRows, LocalRounds, Task, read_result
from edge_runtime.agent.options import DeviceEvent, DeviceOptions
from edge_runtime.agent.planner import Planned, Planner, Unplanned
from edge_runtime.agent.store import DeviceStore
from edge_runtime.agent.trainer import CAUSES, KILLED, Ended
from edge_runtime.agent.versions import artifacts_of, forget_others
from edge_runtime.agent.workers import Workers
from edge_runtime.errors import BudgetError, EdgeError, InputError, TrainerError, UnreachableError
from edge_runtime.protocol.report import Cause, Report, Result
from edge_runtime.protocol.round import Round
from edge_runtime.trainer.job import Machine, Progress

log = logging.getLogger(__name__)
ATTEMPTS = 3  # trainer processes a round


class Rounds:
    """The rounds of one device; used from the agent's thread."""

    def __init__(
        self,
        session: Session,
        store: DeviceStore,
        options: DeviceOptions,
        device_rows: DeviceRows,
        workers: Workers,
        tell: Callable[[DeviceEvent], None],
    ) -> None:
        """Nothing is sent yet; tell gets every event, for the screen."""
        self.stage: stages.Stage = stages.Resting()
        self._session, self._store, self._options = session, store, options
        self._workers, self._tell = workers, tell
        state = options.state.resolve()
        self._adapter, self._versions = state / "adapter", state / "versions"
        key = signing.load_or_create_key(options.state / "device.key")
        machine = Machine(options.threads, options.device, options.budget_bytes, options.gpu_cap_bytes)
        self._local = LocalRounds(state / "work", store, device_rows, machine, self._adapter)
        self._deliveries = Deliveries(session, store, options, key, self._local)
        self._reports = self._deliveries.reports
        self._fetcher = Fetcher(session, options.fleet, options.id, self._versions)
        self._planner = Planner(options.budget_bytes, workers.find_plan, session.put)
        self._round: stages.RoundInProgress | None = None

    def start(self) -> None:
        """Listen to the node; call once connected."""
        self._deliveries.uploader.start()

    def tick(self) -> float:
        """Send what is due; seconds until the next call is of use."""
        return min(self._deliveries.uploader.tick(), self._fetcher.tick())

    def end_trainer(self) -> None:
        """Stop the trainer, if one runs."""
        if isinstance(self.stage, stages.Working):
            self.stage.trainer.stop()
            self.stage = stages.Resting()

    # --- events

    def announce(self, announced: Round, node_key: str) -> None:
        """A node has announced a round, perhaps once more."""
        if self._round and self._round.is_same(announced, node_key):
            # the node is there again
            if isinstance(self.stage, stages.Starved):
                self._plan(self._round)
            return
        # the fleet went on without this device
        self.end_trainer()
        self._fetcher.drop()
        self._round = stages.RoundInProgress(announced, node_key)
        self._deliveries.begin(self._round)
        if announced.state == "open" and int(self._store.get("round") or 0) >= announced.round:
            self.stage = stages.Resting()
            self.say("waiting", text="this round is trained already")
        else:
            self._plan(self._round)

    def handle(self, item: Message | Event | None) -> None:
        """Take in an event of the session; planner and trainer put theirs there too."""
        if isinstance(item, Own):
            self._handle_own(item.item)
            return
        settled = self._deliveries.uploader.handle(item)
        if settled is not None:
            self._settled(settled)
        fetched = self._fetcher.handle(item)
        if isinstance(self.stage, stages.Fetching) and isinstance(fetched, Fetched):
            self._fetch(self.stage, fetched)
        elif isinstance(self.stage, stages.Fetching) and isinstance(fetched, Failed):
            self._starve(self.stage.round, fetched.reason)
        if isinstance(item, Connected):
            self._connected(item)

    def _handle_own(self, item: object) -> None:
        """Take in an event of the planner's thread or of the trainer."""
        stage = self.stage
        if isinstance(item, Planned | Unplanned):
            self._planner.take(item)
            if isinstance(stage, stages.Planning) and isinstance(item, Unplanned):
                self._give_up(item.error, item.cause)
            elif isinstance(stage, stages.Planning):
                # plans again if fleet or budget have changed meanwhile
                self._plan(stage.round)
        elif isinstance(item, Progress):
            self._show(item)
        elif isinstance(item, Ended) and isinstance(stage, stages.Working) and item.pid == stage.trainer.pid:
            self._ended(stage, item)

    def _connected(self, connected: Connected) -> None:
        self._store.set("epoch", str(connected.epoch))
        self._reports.publish_owed()
        if isinstance(self.stage, stages.Fetching) and self.stage.interrupted:
            self._fetch(self.stage)
        elif isinstance(self.stage, stages.Starved):
            self._plan(self.stage.round)

    # --- a round: plan, fetch, train

    def _plan(self, current: stages.RoundInProgress) -> None:
        announced = current.announced
        planned = self._planner.plan(announced.fleet, self._local.rank_limit(announced.round))
        if planned is not None:
            self._begin(current, planned)
        else:
            self.stage = stages.Planning(current)
            self.say("planning")

    def _begin(self, current: stages.RoundInProgress, planned: Planned) -> None:
        """Report the plan (the node pins the key of a first report), and get the global version."""
        self._reports.publish(self._report("joined"))
        # the round starts from a version, and a residual, that the node's word on that update decides
        if self._deliveries.pending:
            ends = current.finished and self._options.until_finished
            self.stage = stages.Owing(current, time.monotonic() + self._options.wait_s if ends else math.inf)
            self._deliveries.uploader.offer_now()
            self.say("waiting", text="for the node's word on the last update")
            return
        artifacts = artifacts_of(current.announced, planned.plan.model_class)
        forget_others(self._versions, artifacts)
        self._fetch(stages.Fetching(current, planned, artifacts, {}))

    def _fetch(self, stage: stages.Fetching, fetched: Fetched | None = None) -> None:
        """Get what the round starts from, one file after another; then train."""
        files = dict(stage.files)
        for name, artifact in stage.artifacts.items():
            if fetched is not None and artifact.digest == fetched.artifact.digest:
                files[name] = fetched.path
        self.stage = stage = stage._replace(files=files, interrupted=False)
        for name, artifact in stage.artifacts.items():
            if name in files:
                continue
            self.say("fetching", text=f"{artifact.size} bytes")
            try:
                present = self._fetcher.fetch(artifact)
            except BrokerError as error:
                if self._session.connected:
                    self._starve(stage.round, str(error))
                else:
                    log.warning("fetching waits for a connection: %s", error)
                    self.stage = stage._replace(interrupted=True)
                return
            # on its way: the session's Fetched event continues here
            if present is None:
                return
            files[name] = present.path
        self._train(stage)

    def _starve(self, current: stages.RoundInProgress, reason: str) -> None:
        """The round's files could not be had. After the last round nobody announces them again."""
        if current.finished:
            self._give_up(UnreachableError(reason), "link")
        else:
            self.stage = stages.Starved(current)
            self._fail(reason, "link")

    def _train(self, stage: stages.Fetching) -> None:
        """Start a trainer: from the global version, or from version 0 where there is none."""
        current, planned, files = stage.round, stage.planned, stage.files
        task = Task(
            number=current.announced.round,
            train=not current.finished,
            fleet=current.announced.fleet,
            facts=planned.facts,
            plan=planned.plan,
            start=files.get("start"),
            anchors=files.get("anchors"),
        )
        current.attempt += 1
        trainer = self._workers.train(self._local.job(task), self._local.folder(task), self._session.put)
        self.stage = stages.Working(current, task, trainer)
        self.say("starting", text=planned.plan.summary)

    def _ended(self, stage: stages.Working, ended: Ended) -> None:
        self.stage = stages.Resting()
        result = read_result(ended.folder) if ended.exit_code == 0 else None
        cause = CAUSES.get(ended.exit_code, "trainer")
        if result is not None and stage.task.train:
            sends = self._deliveries.keep(stage, ended.folder, result)
            self.say("sending" if sends else "waiting", text=f"{result.payload_bytes} bytes")
            if not sends:
                self._deliveries.close_round()
        elif result is not None:
            self._finish(result)
        elif ended.exit_code == InputError.exit_code:
            cause = "input" if rows.readable(self._local.rows) else "data"
            self._give_up(InputError(ended.reason), cause, ended.exit_code)
        elif stage.round.attempt >= ATTEMPTS:
            self._give_up(TrainerError(ended.reason), cause, ended.exit_code)
        else:
            if cause == "memory":
                self._planner.shrink(stage.task.plan, killed=ended.exit_code == KILLED)
            self.say("again", text=ended.reason)
            self._plan(stage.round)

    # --- the end of a round

    def _settled(self, settled: Committed | Rejected) -> None:
        number = settled.manifest.round
        if isinstance(settled, Rejected) and not settled.final:
            self.say("waiting", text=f"the node does not take round {number} yet: {settled.reason}")
            if settled.code == "signature" and self._round is not None and not self._round.introduced:
                # the report with this device's key was lost; told again once a round
                self._round.introduced = True
                self._reports.publish(self._report("joined"))
                self._deliveries.uploader.offer_now()
            return
        if isinstance(settled, Committed):
            self.say("waiting", text=f"the node took round {number}")
            self._deliveries.close_round()
        else:
            self.say("rejected", text=settled.reason)
            self._reports.publish_owed()
        if isinstance(self.stage, stages.Owing):
            self._plan(self.stage.round)

    def _finish(self, result: Result) -> None:
        self._reports.owe(self._report("finished", result))
        self._reports.publish_owed()
        self.say("finished", text=f"the adapter is in {self._adapter}")
        if self._options.until_finished:
            self.stage = stages.Finished()

    # --- telling

    def _fail(self, reason: str, cause: Cause, exit_code: int | None = None) -> None:
        """Tell the node that this device is out of the round; the reason stays on this device."""
        self.say("failed", text=reason)
        failed = msgspec.structs.replace(self._report("failed"), cause=cause, exit_code=exit_code)
        self._reports.publish(failed)

    def _give_up(self, error: EdgeError, cause: Cause, exit_code: int | None = None) -> None:
        """Fail the round. End the agent if the next would fail alike, or nobody waits for one."""
        self.stage = stages.Resting()
        self._fail(str(error), cause, error.exit_code if exit_code is None else exit_code)
        if self._options.until_finished or isinstance(error, BudgetError | InputError):
            raise error

    def _report(self, state: Literal["joined", "failed", "finished"], result: Result | None = None) -> Report:
        planned = self._planner.latest
        return self._reports.of(self._round, state, planned.plan if planned else None, result)

    def say(self, phase: str, text: str = "") -> None:
        """Tell whoever watches the screen."""
        self._show(Progress(phase), text)

    def _show(self, progress: Progress, text: str = "") -> None:
        number = self._round.announced.round if self._round else 0
        self._tell(
            DeviceEvent(
                device=self._options.id,
                round=number,
                **msgspec.structs.asdict(progress),
                budget_bytes=self._options.budget_bytes,
                text=text,
            )
        )
