"""A device's rounds: each event of the link, the planner or the trainer moves the stage on."""

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec
from edge_broker import signing
from edge_broker.errors import BrokerError
from edge_broker.session import Connected, Event, Message, Own, Session
from edge_broker.transfer import Committed, Failed, Fetched, Fetcher, Rejected

from edge_runtime.agent import stages
from edge_runtime.agent.deliveries import Deliveries
from edge_runtime.agent.local_round import DeviceRows, LocalRounds, Start, read_result
from edge_runtime.agent.newest import NewestVersion
from edge_runtime.agent.options import DeviceEvent, DeviceOptions
from edge_runtime.agent.planner import Planned, Planner, Request, Unplanned
from edge_runtime.agent.store import DeviceStore
from edge_runtime.agent.trainer import CAUSES, KILLED, Ended, Running
from edge_runtime.errors import BudgetError, EdgeError, InputError, TrainerError, UnreachableError
from edge_runtime.protocol.report import Cause
from edge_runtime.protocol.round import FLEET, Round
from edge_runtime.state import NEWEST
from edge_runtime.trainer.job import Job, Machine, Progress

log = logging.getLogger(__name__)
ATTEMPTS = 3  # trainer processes a round


class Workers(NamedTuple):
    """Who does the work on a device; a benchmark of the link puts others in their place."""

    find_plan: Callable[[Request], Planned | Unplanned]  # called in a thread
    # Starts a job in its folder and returns at once; progress and end are posted later.
    train: Callable[[Job, Path, Callable[[Progress | Ended], None]], Running]


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
        self.stage: stages.Stage = "resting"
        self._session, self._store, self._options = session, store, options
        self._workers, self._tell = workers, tell
        state = options.state.resolve()
        self._adapter, self._versions = state / NEWEST, state / "versions"
        key = signing.load_or_create_key(options.state / "device.key")
        machine = Machine(options.threads, options.device, options.budget_bytes, options.gpu_cap_bytes)
        self._local = LocalRounds(state / "work", store, device_rows, machine, self._adapter)
        self._deliveries = Deliveries(session, store, options, key, self._local)
        self._fetcher = Fetcher(session, options.fleet, options.id, self._versions)
        self._newest = NewestVersion(options, self._adapter, store, session.put)
        self._planner = Planner(options.budget_bytes, workers.find_plan, session.put)
        self._round = stages.RoundInProgress()

    def start(self) -> None:
        """Listen to the node; call once connected."""
        self._deliveries.uploader.start()

    def tick(self) -> float:
        """Send what is due; seconds until the next call is of use."""
        return min(self._deliveries.uploader.tick(), self._fetcher.tick(), self._newest.tick())

    def close(self) -> None:
        """Stop the trainer and the server."""
        self.end_trainer()
        self._newest.stop()

    def end_trainer(self) -> None:
        """Stop the trainer, if one runs."""
        if isinstance(self.stage, stages.Working):
            self.stage.trainer.stop()
            self.stage = "resting"

    # --- events

    def announce(self, announced: Round, node_key: str) -> None:
        """A node has announced a round, perhaps once more."""
        last = self._round.announced
        if (self._round.node_key, last.state, last.round) == (node_key, announced.state, announced.round):
            # the node is there again, perhaps with its files in smaller chunks
            self._round.announced = announced
            if self.stage == "starved" or (announced != last and isinstance(self.stage, stages.Fetching)):
                self._plan()
            return
        # the fleet went on without this device
        self.end_trainer()
        self._fetcher.drop()
        self._round = stages.RoundInProgress(announced, node_key)
        self._deliveries.begin(self._round)
        if announced.state == "open" and int(self._store.get("round") or 0) >= announced.round:
            self.stage = "resting"
            self.say("waiting", text="this round is trained already")
        else:
            self._plan()

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
            self._fetch(self.stage)
        elif isinstance(self.stage, stages.Fetching) and isinstance(fetched, Failed):
            self._starve(fetched.reason)
        if isinstance(item, Connected):
            self._store.set("epoch", str(item.epoch))
            self._deliveries.publish_owed()
            if isinstance(self.stage, stages.Fetching) and self.stage.interrupted:
                self._fetch(self.stage)
            elif self.stage == "starved":
                self._plan()

    def _handle_own(self, item: object) -> None:
        """Take in an event of the planner's thread or of the trainer."""
        stage = self.stage
        if isinstance(item, Planned | Unplanned):
            self._planner.take(item)
            if stage == "planning" and isinstance(item, Unplanned):
                self._give_up(item.error, item.cause)
            elif stage == "planning":
                # plans again if fleet or budget have changed meanwhile
                self._plan()
        elif isinstance(item, Progress | Ended):
            # a line of an earlier trainer may come late
            if isinstance(stage, stages.Working) and isinstance(item, Progress):
                self._newest.look(stage.job.plan)
            if isinstance(item, Progress):
                self.say(item)
            elif isinstance(stage, stages.Working) and item.pid == stage.trainer.pid:
                self._newest.look(stage.job.plan)
                self._ended(stage.job, item)
        elif (text := self._newest.handle(item)) is not None:
            self.say("serving", text=text)

    # --- a round: plan, fetch, train

    def _plan(self) -> None:
        announced = self._round.announced
        planned = self._planner.plan(announced.fleet, self._local.rank_limit(announced.round))
        if planned is not None:
            self._begin(planned)
        else:
            self.stage = "planning"
            self.say("planning")

    def _begin(self, planned: Planned) -> None:
        """Report the plan (the node pins the key of a first report), and get the global version."""
        self._report("joined")
        # the round starts from a version, and a residual, that the node's word on that update decides
        if self._deliveries.pending:
            ends = self._round.finished and self._options.until_finished
            self.stage = stages.Owing(time.monotonic() + self._options.wait_s if ends else math.inf)
            self._deliveries.uploader.offer_now()
            self.say("waiting", text="for the node's word on the last update")
            return
        announced = self._round.announced
        start = announced.versions.get(planned.plan.model_class, announced.versions.get(FLEET, ()))
        stage = stages.Fetching(planned, start, announced.texts)
        # files that earlier rounds have fetched; of a chain that goes on, only the last is missing
        needed = {artifact.digest for artifact in stage.artifacts}
        for path in self._versions.glob("*"):
            if path.name.partition(".")[0] not in needed:
                path.unlink(missing_ok=True)
        self._fetch(stage)

    def _fetch(self, stage: stages.Fetching) -> None:
        """Get what the round starts from, one file after another; then train."""
        self.stage = stage = stage._replace(interrupted=False)
        files: list[Path] = []
        for artifact in stage.artifacts:
            try:
                fetched = self._fetcher.fetch(artifact)
            except BrokerError as error:
                if self._session.connected:
                    self._starve(str(error))
                else:
                    log.warning("fetching waits for a connection: %s", error)
                    self.stage = stage._replace(interrupted=True)
                return
            # on its way: the session's Fetched event continues here
            if fetched is None:
                self.say("fetching", text=f"{artifact.size} bytes")
                return
            files.append(fetched.path)
        self._train(stage, files)

    def _starve(self, reason: str) -> None:
        """The round's files could not be had. After the last round nobody announces them again."""
        if self._round.finished:
            self._give_up(UnreachableError(reason), "link")
        else:
            self.stage = "starved"
            self._fail(reason, "link")

    def _train(self, stage: stages.Fetching, files: list[Path]) -> None:
        """Start a trainer with the files of the stage's artifacts."""
        planned, count = stage.planned, len(stage.start)
        number, fleet = self._round.announced.round, self._round.announced.fleet
        start, train = Start(files[:count], [*files, None][count]), not self._round.finished
        job = self._local.job(number, fleet, planned.facts, planned.plan, start, train=train)
        self._round.attempt += 1
        trainer = self._workers.train(job, self._local.folder(job), self._session.put)
        self.stage = stages.Working(job, trainer)
        self.say("starting", text="; ".join(filter(None, (planned.plan.summary, planned.server))))

    def _ended(self, job: Job, ended: Ended) -> None:
        self.stage = "resting"
        result = read_result(self._local.folder(job)) if ended.exit_code == 0 else None
        cause = CAUSES.get(ended.exit_code, "trainer")
        if result is not None and job.train:
            sends = self._deliveries.keep(job, result)
            self.say("sending" if sends else "waiting", text=f"{result.payload_bytes} bytes")
            if not sends:
                self._deliveries.close_round()
        elif result is not None:
            self._deliveries.owe(self._deliveries.report("finished", job.plan, result))
            self._deliveries.publish_owed()
            self.say("finished", text=f"the adapter is in {self._adapter}")
            if self._options.until_finished:
                self.stage = "finished"
        elif ended.exit_code == InputError.exit_code:
            cause = "input" if self._local.rows.readable else "data"
            self._give_up(InputError(ended.reason), cause, ended.exit_code)
        elif self._round.attempt >= ATTEMPTS:
            self._give_up(TrainerError(ended.reason), cause, ended.exit_code)
        else:
            if cause == "memory":
                self._planner.shrink(job.plan, killed=ended.exit_code == KILLED)
            self.say("again", text=ended.reason)
            self._plan()

    # --- the end of a round

    def _settled(self, settled: Committed | Rejected) -> None:
        number = settled.manifest.round
        if isinstance(settled, Rejected) and not settled.final:
            self.say("waiting", text=f"the node does not take round {number} yet: {settled.reason}")
            if settled.code == "signature" and self._round.announced.round and not self._round.introduced:
                # the report with this device's key was lost; told again once a round
                self._round.introduced = True
                self._report("joined")
                self._deliveries.uploader.offer_now()
            return
        if isinstance(settled, Committed):
            self.say("waiting", text=f"the node took round {number}")
            self._deliveries.close_round()
        else:
            self.say("rejected", text=settled.reason)
            self._deliveries.publish_owed()
        if isinstance(self.stage, stages.Owing):
            self._plan()

    def _fail(self, reason: str, cause: Cause, exit_code: int | None = None) -> None:
        """Tell the node that this device is out of the round; the reason stays on this device."""
        self.say("failed", text=reason)
        self._report("failed", cause, exit_code)

    def _give_up(self, error: EdgeError, cause: Cause, exit_code: int | None = None) -> None:
        """Fail the round. End the agent if the next would fail alike, or nobody waits for one."""
        self.stage = "resting"
        self._fail(str(error), cause, error.exit_code if exit_code is None else exit_code)
        if self._options.until_finished or isinstance(error, BudgetError | InputError):
            raise error

    def _report(
        self, state: Literal["joined", "failed"], cause: Cause | None = None, exit_code: int | None = None
    ) -> None:
        plan = self._planner.latest.plan if self._planner.latest else None
        self._deliveries.publish(self._deliveries.report(state, plan, cause=cause, exit_code=exit_code))

    def say(self, phase: str | Progress, text: str = "") -> None:
        """Tell whoever watches the screen."""
        progress = Progress(phase, text=text) if isinstance(phase, str) else phase
        self._tell(
            DeviceEvent(
                device=self._options.id,
                round=self._round.announced.round,
                **msgspec.structs.asdict(progress),
                budget_bytes=self._options.budget_bytes,
            )
        )
