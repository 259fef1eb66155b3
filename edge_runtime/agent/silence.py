"""The sentences of an agent that has not heard of its node in time."""

import time
from contextlib import suppress

from edge_broker import topics
from edge_broker.errors import BadMessage, WrongKey
from edge_broker.session import Message, Session

from edge_runtime.agent.options import DeviceOptions

LISTEN_S = 15.0  # at most, for the names of fleets


def ignored(error: BadMessage) -> str:
    """Why an announced round does not count."""
    advice = "; to trust that node, start with a new --state" if isinstance(error, WrongKey) else ""
    return f"a round was announced, but {error}{advice}"


def no_round(session: Session, options: DeviceOptions) -> str:
    """No round of the fleet was announced: name the fleets that are."""
    session.subscribe(topics.all_rounds())
    fleets: set[str] = set()
    until = time.monotonic() + LISTEN_S
    while time.monotonic() < until and isinstance(item := session.receive(1.0), Message):
        with suppress(BadMessage):
            fleets.add(topics.parse(item.topic).fleet)
    names = ", ".join(sorted(fleets))
    announced = f"fleets on this broker: {names}" if fleets else "no fleet is announced on this broker"
    return (
        f"no round of fleet `{options.fleet}` was announced at {options.broker} within "
        f"{options.wait_s:g} s; {announced}; check --fleet, or start `edge-runtime aggregator` there"
    )


def no_word(options: DeviceOptions) -> str:
    """The fleet has finished, and an update was never answered."""
    return (
        f"fleet `{options.fleet}` has finished, but its node has not answered the last update within "
        f"{options.wait_s:g} s; the update is kept: start the agent again while `edge-runtime aggregator` runs"
    )
