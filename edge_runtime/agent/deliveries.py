"""Updates that this device owes its node: kept with their reports, settled by the node's word."""

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from edge_broker import messages
from edge_broker.outbox import Outbox
from edge_broker.session import Session
from edge_broker.transfer import Committed, Rejected, Uploader

from edge_runtime.agent.local_round import LocalRounds, Verdict, payload_of
from edge_runtime.agent.options import DeviceOptions
from edge_runtime.agent.reports import Reports
from edge_runtime.agent.stages import RoundInProgress, Working
from edge_runtime.agent.store import DeviceStore
from edge_runtime.protocol.report import Result
from edge_runtime.protocol.round import CODEC

SPOILT = ("content", "digest", "payload")  # codes of refusals that concern the content of an update


class Deliveries:
    """One device's updates; used from the agent's thread."""

    def __init__(
        self,
        session: Session,
        store: DeviceStore,
        options: DeviceOptions,
        key: Ed25519PrivateKey,
        local: LocalRounds,
    ) -> None:
        """Nothing is sent before the uploader starts; key signs manifests and reports."""
        self._session, self._store, self._options, self._local = session, store, options, local
        self._outbox = Outbox(store.connection, options.state)
        self.reports = Reports(session, store, self._outbox, options, key)
        self.uploader = Uploader(session, self._outbox, options.fleet, options.id, key, self._settle)
        self._round: RoundInProgress | None = None

    def begin(self, current: RoundInProgress) -> None:
        """A round was announced: an owed report is due, and traffic is counted anew."""
        self.reports.publish_owed()
        self.reports.begin()
        self._round = current

    @property
    def pending(self) -> bool:
        """Whether the node has still to answer an update."""
        return bool(self._outbox.pending())

    def keep(self, stage: Working, folder: Path, result: Result) -> bool:
        """Keep a trained round: from here on the node is owed its update, whatever happens to this
        process.

        Returns:
            Whether there is an update; some methods exchange nothing.
        """
        task, payload = stage.task, payload_of(folder, result)
        # one transaction: after a kill, the update, its report and what the next round needs agree
        with self._outbox.transaction():
            self._local.keep(task, result)
            self._store.set("node_key", stage.round.node_key)
            self._store.set("round", str(task.number))
            self.reports.owe(self.reports.of(stage.round, "trained", task.plan, result))
            if payload:
                origin = messages.Origin(
                    fleet=self._options.fleet,
                    device=self._options.id,
                    round=task.number,
                    model_class=task.plan.model_class,
                    codec=CODEC,
                    samples=result.samples,
                    attempt=stage.round.attempt,
                )
                manifest = messages.describe(payload, origin, self._session.chunk_bytes)
                self._outbox.add(manifest, payload)
        return payload is not None

    def close_round(self) -> None:
        """The node needs no more of a round: publish its report, delete files nobody needs."""
        self.reports.publish_owed()
        self._local.tidy(manifest.round for manifest in self._outbox.pending())

    def _settle(self, settled: Committed | Rejected) -> None:
        """Called in the transaction in which the outbox settles an update."""
        spoilt = isinstance(settled, Rejected) and settled.code in SPOILT
        verdict: Verdict = "spoilt" if spoilt else "taken" if isinstance(settled, Committed) else "refused"
        self._local.settle(settled.manifest.round, verdict)
        if isinstance(settled, Rejected) and settled.final:
            # After the last round the node waits for the report of the end alone.
            finished = self._round is not None and self._round.finished
            self.reports.refused(settled.manifest.round, tell=not finished)
