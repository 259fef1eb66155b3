"""What this device owes its node: its updates, settled by the node's word, and its reports.

Reports are signed, retained, and hold the traffic of the round. A report of the end of a round is
kept in SQLite first, and published once the outbox is empty: that the node has taken the update is
part of such a report.
"""

import logging
from typing import Literal

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from edge_broker import messages, signing, topics
from edge_broker.errors import BrokerError
from edge_broker.outbox import Outbox
from edge_broker.session import Session
from edge_broker.transfer import Committed, Rejected, Uploader

from edge_runtime.agent.local_round import LocalRounds, payload_of
from edge_runtime.agent.options import DeviceOptions
from edge_runtime.agent.stages import RoundInProgress
from edge_runtime.agent.store import DeviceStore
from edge_runtime.protocol.plan import Plan
from edge_runtime.protocol.report import REPORT_DOMAIN, Cause, Report, Result, without_names
from edge_runtime.protocol.round import CODEC
from edge_runtime.trainer.job import Job

log = logging.getLogger(__name__)
SPOILT = ("content", "digest", "payload")  # codes of refusals that concern the content of an update


class Deliveries:
    """One device's updates and reports; used from the agent's thread."""

    def __init__(
        self,
        session: Session,
        store: DeviceStore,
        options: DeviceOptions,
        key: Ed25519PrivateKey,
        local: LocalRounds,
    ) -> None:
        """Nothing is sent before the uploader starts; key signs manifests and reports."""
        self._session, self._store, self._options = session, store, options
        self._key, self._local = key, local
        self._outbox = Outbox(store.connection, options.state)
        self.uploader = Uploader(session, self._outbox, options.fleet, options.id, key, self._settle)
        self._round, self._traffic = RoundInProgress(), session.traffic

    def begin(self, current: RoundInProgress) -> None:
        """A round was announced: an owed report is due, and traffic is counted anew."""
        self.publish_owed()
        self._round, self._traffic = current, self._session.traffic

    @property
    def pending(self) -> bool:
        """Whether the node has still to answer an update."""
        return bool(self._outbox.pending())

    def keep(self, job: Job, result: Result) -> bool:
        """Keep a trained round: from here on the node is owed its update, whatever happens to this
        process.

        Returns:
            Whether there is an update; some methods exchange nothing.
        """
        payload = payload_of(self._local.folder(job), result)
        # one transaction: after a kill, the update, its report and what the next round needs agree
        with self._outbox.transaction():
            self._local.keep(job, result)
            self._store.set("node_key", self._round.node_key)
            self._store.set("round", str(job.round))
            self.owe(self.report("trained", job.plan, result))
            if payload:
                origin = messages.Origin(
                    fleet=self._options.fleet,
                    device=self._options.id,
                    round=job.round,
                    model_class=job.plan.model_class,
                    codec=CODEC,
                    samples=result.samples,
                    attempt=self._round.attempt,
                )
                manifest = messages.describe(payload, origin, self._session.chunk_bytes)
                self._outbox.add(manifest, payload)
        return payload is not None

    def close_round(self) -> None:
        """The node needs no more of a round: publish its report, delete files nobody needs."""
        self.publish_owed()
        self._local.tidy(manifest.round for manifest in self._outbox.pending())

    def _settle(self, settled: Committed | Rejected) -> None:
        """Called in the transaction in which the outbox settles an update."""
        number = settled.manifest.round
        if isinstance(settled, Committed):
            self._local.settle(number, "taken")
            return
        self._local.settle(number, "spoilt" if settled.code in SPOILT else "refused")
        report = self._owed()
        if report is not None and report.round == number:
            # After the last round the node waits for the report of the end alone.
            cause: Cause = "link" if settled.code == "limit" else "refused"
            failed = msgspec.structs.replace(report, state="failed", result=None, cause=cause)
            self.owe(None if self._round.finished else failed)

    # --- reports

    def report(
        self,
        state: Literal["joined", "trained", "failed", "finished"],
        plan: Plan | None,
        result: Result | None = None,
        cause: Cause | None = None,
        exit_code: int | None = None,
    ) -> Report:
        """A report of the round, to its node."""
        return Report(
            device=self._options.id,
            node_key=self._round.node_key,
            round=self._round.announced.round,
            state=state,
            budget_bytes=self._options.budget_bytes,
            plan=plan,
            result=result,
            cause=cause,
            exit_code=exit_code,
        )

    def owe(self, report: Report | None) -> None:
        """Keep a report until `publish_owed` may send it; None forgets the one that is kept."""
        self._store.set("report", None if report is None else msgspec.json.encode(report).decode())

    def publish_owed(self) -> None:
        """Publish the report that is kept, if the outbox is empty."""
        report = self._owed()
        if report is not None and not self.pending and self.publish(report):
            self.owe(None)

    def publish(self, report: Report) -> bool:
        """Publish now, without the user's names of files; False: it did not get through."""
        traffic = self._session.traffic
        counted = msgspec.structs.replace(
            report,
            result=without_names(report.result) if report.result is not None else None,
            bytes_up=traffic.bytes_up - self._traffic.bytes_up,
            bytes_down=traffic.bytes_down - self._traffic.bytes_down,
            process=self._session.process,
        )
        signed = signing.sign(self._key, REPORT_DOMAIN, msgspec.json.encode(counted))
        try:
            self._session.publish(topics.report(self._options.fleet, report.device), signed, retain=True)
        except BrokerError as error:
            log.warning("the report of round %s did not get through: %s", report.round, error)
            return False
        return True

    def _owed(self) -> Report | None:
        owed = self._store.get("report")
        return msgspec.json.decode(owed, type=Report) if owed else None
