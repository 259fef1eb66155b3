"""Reads what a fleet has left on the broker: the round, presence and last reports, all retained.

A device that will not come back is forgotten by taking its presence and its report off the broker.
"""

import time
import uuid
from contextlib import suppress

import msgspec
from edge_broker import messages, presence, signing, topics
from edge_broker.address import Address
from edge_broker.errors import BadMessage, BrokerError
from edge_broker.session import Message, Session

from edge_runtime.errors import InputError, UnreachableError
from edge_runtime.protocol.report import REPORT_DOMAIN, Report
from edge_runtime.protocol.round import ROUND_DOMAIN, Round

CONNECT_TIMEOUT_S = 15.0
QUIET_S = 1.0  # retained messages come at once; a second without any means that all have come
LONGEST_S = 15.0  # for a fleet that is never silent so long


class DeviceStatus(msgspec.Struct):
    """A device as the broker knows it."""

    id: str
    presence: str  # online, offline, lost or unknown
    report: Report | None = None  # the last one


class Status(msgspec.Struct):
    """A fleet as the broker knows it."""

    fleet: str
    round: Round
    devices: list[DeviceStatus]


def read(broker: Address, fleet: str) -> Status:
    """Look at a fleet.

    Raises:
        UnreachableError: no broker, or no such fleet on it; the message names the fleets on it.
    """
    items = []
    try:
        with Session(broker, f"status-{uuid.uuid4().hex[:12]}", session_expiry_s=0) as session:
            session.connect(CONNECT_TIMEOUT_S)
            session.subscribe(
                topics.round(topics.ANY), topics.presence(fleet, topics.ANY), topics.report(fleet, topics.ANY)
            )
            until = time.monotonic() + LONGEST_S
            while time.monotonic() < until and (item := session.receive(QUIET_S)) is not None:
                items.append(item)
    except BrokerError as error:
        raise UnreachableError(str(error)) from error
    tracker = presence.Tracker()
    rounds: dict[str, Round] = {}
    reports: dict[str, Report] = {}
    for message in (item for item in items if isinstance(item, Message)):
        with suppress(BadMessage):  # a stranger's message is not shown
            topic = topics.parse(message.topic)
            if topic.kind == "round":
                body, _ = signing.open(message.payload, ROUND_DOMAIN, None)
                rounds[topic.fleet] = messages.decode(body, Round)
            elif topic.kind == "report":
                body, _ = signing.open(message.payload, REPORT_DOMAIN, None)
                reports[topic.device] = messages.decode(body, Report)
            else:
                tracker.handle(message.topic, message.payload)
    if fleet not in rounds:
        names = ", ".join(sorted(rounds))
        announced = f"fleets on this broker: {names}" if rounds else "no fleet is announced on this broker"
        raise UnreachableError(f"there is no fleet `{fleet}` at {broker}; {announced}")
    ids = sorted({*tracker.devices, *reports})
    devices = [DeviceStatus(id, tracker.state(id), reports.get(id)) for id in ids]
    return Status(fleet, rounds[fleet], devices)


def forget(broker: Address, status: Status, device: str) -> Status:
    """Take a device's messages off the broker, and its row out of the status.

    One that still lives publishes them again, at the node's next announcement at the latest.

    Raises:
        InputError: the fleet has no such device.
        UnreachableError: no broker, or it lets only nodes do that.
    """
    others = [known for known in status.devices if known.id != device]
    if len(others) == len(status.devices):
        names = ", ".join(known.id for known in others) or "none"
        raise InputError(f"fleet `{status.fleet}` has no device `{device}` to forget; its devices: {names}")
    try:
        with Session(broker, f"status-{uuid.uuid4().hex[:12]}", session_expiry_s=0) as session:
            session.connect(CONNECT_TIMEOUT_S)
            for topic in (topics.presence(status.fleet, device), topics.report(status.fleet, device)):
                session.publish(topic, b"", retain=True)
    except BrokerError as error:
        raise UnreachableError(str(error)) from error
    return msgspec.structs.replace(status, devices=others)
