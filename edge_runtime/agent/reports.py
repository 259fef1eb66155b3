"""The device's reports to the node: signed, retained, with the traffic of the round.

A report of the end of a round is kept in SQLite first, and published once the outbox is empty: that
the node has taken the update is part of such a report.
"""

import logging
from typing import Literal

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from edge_broker import signing, topics
from edge_broker.errors import BrokerError
from edge_broker.outbox import Outbox
from edge_broker.session import Session

from edge_runtime.agent.options import DeviceOptions
from edge_runtime.agent.stages import RoundInProgress
from edge_runtime.agent.store import DeviceStore
from edge_runtime.protocol.plan import Plan
from edge_runtime.protocol.report import REPORT_DOMAIN, Report, Result, without_names

log = logging.getLogger(__name__)


class Reports:
    """One device's reports."""

    def __init__(
        self,
        session: Session,
        store: DeviceStore,
        outbox: Outbox,
        options: DeviceOptions,
        key: Ed25519PrivateKey,
    ) -> None:
        """Nothing is sent yet; key signs the reports."""
        self._session, self._store, self._outbox = session, store, outbox
        self._options, self._key = options, key
        self._traffic = session.traffic  # when the round began

    def begin(self) -> None:
        """A round begins: count traffic from now on."""
        self._traffic = self._session.traffic

    def of(
        self,
        current: RoundInProgress | None,
        state: Literal["joined", "trained", "failed", "finished"],
        plan: Plan | None,
        result: Result | None = None,
    ) -> Report:
        """A report of the round, to its node."""
        return Report(
            device=self._options.id,
            node_key=current.node_key if current else "",
            round=current.announced.round if current else 0,
            state=state,
            budget_bytes=self._options.budget_bytes,
            plan=plan,
            result=result,
        )

    def owe(self, report: Report) -> None:
        """Keep a report until `publish_owed` may send it."""
        self._store.set("report", msgspec.json.encode(report).decode())

    def publish_owed(self) -> None:
        """Publish the report that is kept, if the outbox is empty."""
        owed = self._store.get("report")
        if owed and not self._outbox.pending() and self.publish(msgspec.json.decode(owed, type=Report)):
            self._store.set("report", None)

    def refused(self, number: int, *, tell: bool) -> None:
        """The node refused the update of a report that is kept: keep that it failed, or nothing."""
        owed = self._store.get("report")
        report = msgspec.json.decode(owed, type=Report) if owed else None
        if report is None or report.round != number:
            return
        if tell:
            self.owe(msgspec.structs.replace(report, state="failed", result=None, cause="refused"))
        else:
            self._store.set("report", None)

    def publish(self, report: Report) -> bool:
        """Publish now, without the user's names of files; False: it did not get through."""
        traffic = self._session.traffic
        counted = msgspec.structs.replace(
            report,
            result=without_names(report.result) if report.result is not None else None,
            bytes_up=traffic.bytes_up - self._traffic.bytes_up,
            bytes_down=traffic.bytes_down - self._traffic.bytes_down,
        )
        signed = signing.sign(self._key, REPORT_DOMAIN, msgspec.json.encode(counted))
        try:
            self._session.publish(topics.report(self._options.fleet, report.device), signed, retain=True)
        except BrokerError as error:
            log.warning("the report of round %s did not get through: %s", report.round, error)
            return False
        return True
