"""Reads what a fleet's devices and node have left on the broker: the round, presence and last reports, all retained."""

import time

import msgspec
from edge_broker import messages, presence, signing, topics
from edge_broker.address import Address
from edge_broker.errors import BadMessage
from edge_broker.errors import LinkError as BrokerError
from edge_broker.session import Message, Session

from edge_runtime.errors import LinkError
from edge_runtime.protocol.report import REPORT_DOMAIN, Report
from edge_runtime.protocol.round import ROUND_DOMAIN, Round

QUIET_S = 1.0  # retained messages come at once; a second without one means that was all
LONGEST_S = 15.0  # in a fleet that is never so long silent


class Device(msgspec.Struct):
    """presence: online, offline, lost or unknown. report: the device's last one."""

    id: str
    presence: str
    report: Report | None = None


class Status(msgspec.Struct):
    """A fleet as the broker knows it."""

    fleet: str
    round: Round
    devices: list[Device]


def read(broker: Address, fleet: str) -> Status:
    """Look at a fleet.

    Raises:
        LinkError: no broker, or no such fleet on it; the fleets that are there are named.
    """
    tracker = presence.Tracker()
    rounds: dict[str, Round] = {}
    reports: dict[str, Report] = {}
    try:
        with Session(broker, f"status-{_unique()}", clean_start=True, session_expiry_s=0) as session:
            session.connect(15.0)
            session.subscribe(topics.all_rounds(), topics.all_presence(fleet), topics.all_reports(fleet))
            until = time.monotonic() + LONGEST_S
            while time.monotonic() < until and (item := session.receive(QUIET_S)) is not None:
                if isinstance(item, Message):
                    _take(item, tracker, rounds, reports)
    except BrokerError as error:
        raise LinkError(str(error)) from error
    if fleet not in rounds:
        there = (
            f"fleets on this broker: {', '.join(sorted(rounds))}"
            if rounds
            else "no fleet is announced on this broker"
        )
        raise LinkError(f"there is no fleet `{fleet}` at {broker}; {there}")
    ids = sorted({*tracker.devices, *reports})
    return Status(fleet, rounds[fleet], [Device(one, tracker.state(one), reports.get(one)) for one in ids])


def _take(
    item: Message, tracker: presence.Tracker, rounds: dict[str, Round], reports: dict[str, Report]
) -> None:
    try:
        where = topics.parse(item.topic)
        if where.kind == "round":
            rounds[where.fleet] = messages.decode(signing.open(item.payload, ROUND_DOMAIN, None)[0], Round)
        elif where.kind == "report":
            reports[where.device] = messages.decode(
                signing.open(item.payload, REPORT_DOMAIN, None)[0], Report
            )
        else:
            tracker.handle(item.topic, item.payload)
    except BadMessage:
        return  # a stranger's message on our topics: not ours to show


def _unique() -> str:
    import uuid

    return uuid.uuid4().hex[:12]
