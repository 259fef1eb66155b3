"""The device's reports to the node: signed, retained, with the traffic of the round.

A report of the end of a round is kept in SQLite first, and published once nothing is left in the outbox: that the node has
taken the update is part of what it says.
"""

import logging

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from edge_broker import signing, topics
from edge_broker.errors import LinkError as BrokerError
from edge_broker.outbox import Outbox
from edge_broker.session import Session

from edge_runtime.agent.store import Store
from edge_runtime.protocol.report import REPORT_DOMAIN, Report, without_names

log = logging.getLogger(__name__)


class Reports:
    """One device's reports."""

    def __init__(
        self, session: Session, store: Store, outbox: Outbox, fleet: str, key: Ed25519PrivateKey
    ) -> None:
        self._session, self._store, self._outbox = session, store, outbox
        self._fleet, self._key = fleet, key
        self._began = session.traffic

    def begin(self) -> None:
        """A round begins: count traffic from here."""
        self._began = self._session.traffic

    def owe(self, report: Report) -> None:
        """Keep a report until `publish_owed` may send it."""
        self._store.set("report", msgspec.json.encode(report).decode())

    def publish_owed(self) -> None:
        """Publish the report that is kept, if nothing is left in the outbox."""
        owed = self._store.get("report")
        if owed and not self._outbox.pending() and self.publish(msgspec.json.decode(owed, type=Report)):
            self._store.set("report", None)

    def refused(self, round_: int, *, tell: bool) -> None:
        """The node did not take the round whose report is owed: owe a report of the failure, or none at all."""
        owed = self._store.get("report")
        report = msgspec.json.decode(owed, type=Report) if owed else None
        if report is None or report.round != round_:
            return
        if tell:
            self.owe(msgspec.structs.replace(report, state="failed", result=None, cause="refused"))
        else:
            self._store.set("report", None)

    def publish(self, report: Report) -> bool:
        """Publish now; False where it did not get through."""
        traffic = self._session.traffic
        counted = msgspec.structs.replace(
            report,
            result=without_names(report.result) if report.result is not None else None,
            bytes_up=traffic.bytes_up - self._began.bytes_up,
            bytes_down=traffic.bytes_down - self._began.bytes_down,
        )
        signed = signing.sign(self._key, REPORT_DOMAIN, msgspec.json.encode(counted)).encode()
        try:
            self._session.publish(topics.report(self._fleet, report.device), signed, retain=True)
        except BrokerError as error:
            log.warning("the report of round %s did not get through: %s", report.round, error)
            return False
        return True
