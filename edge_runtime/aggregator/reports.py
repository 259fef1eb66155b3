"""Reads the reports that devices publish about a round."""

import logging

from edge_broker import messages, signing, topics
from edge_broker.errors import BadMessage
from edge_broker.session import Message

from edge_runtime.aggregator.store import NodeStore
from edge_runtime.protocol.report import REPORT_DOMAIN, Report
from edge_runtime.settings import Fleet

log = logging.getLogger(__name__)


def read(message: Message, fleet: Fleet, store: NodeStore, node_key: str) -> Report | None:
    """Store a device's report, and pin the device's key if this is its first.

    Returns:
        The report; None where it is for an earlier node of this name.

    Raises:
        BadMessage: the report is not this device's, is not signed by its key, or is of no round of
            this fleet.
    """
    device = topics.parse(message.topic).device
    body, key = signing.open(message.payload, REPORT_DOMAIN, store.key(device))
    report = messages.decode(body, Report)
    if report.node_key != node_key:
        log.info("%s reports to an earlier node of this name", device)
        return None
    if report.device != device:
        raise BadMessage(f"{device} sent a report of {report.device}")
    if not 1 <= report.round <= fleet.rounds:
        raise BadMessage(f"{device} reports round {report.round}, this fleet has 1 to {fleet.rounds}")
    store.pin(device, key)
    store.add_report(report)
    return report
