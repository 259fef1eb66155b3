"""The agent: waits for rounds, plans, has them trained, and hands the delta to the node.

    round announced ─> plan ─> fetch the global version ─> trainer ─> outbox ─> receipt ─> report

Every event of the broker, the trainer and the planner's thread comes through the session's one
queue, so the agent is one loop without locks. Whatever must survive a kill is in SQLite before it
is acted on: a restarted agent offers a delta that it owes again, and trains a round again whose
result was not complete.
"""

import logging
import math
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from edge_broker import messages, signing, topics
from edge_broker.errors import BadMessage, BrokerError, WrongKey
from edge_broker.presence import PresenceSpec
from edge_broker.session import Message, Session

from edge_runtime.agent.local_round import DeviceRows
from edge_runtime.agent.options import DeviceEvent, DeviceOptions
from edge_runtime.agent.planner import find_plan
from edge_runtime.agent.rounds import Rounds, Workers
from edge_runtime.agent.stages import Owing, Stage, Waiting
from edge_runtime.agent.store import DeviceStore
from edge_runtime.agent.trainer import Trainer
from edge_runtime.errors import InputError, UnreachableError
from edge_runtime.protocol.round import ROUND_DOMAIN, Round

log = logging.getLogger(__name__)
CONNECT_TIMEOUT_S = 15.0
IDLE_S = 5.0  # between two looks at the time
LISTEN_S = 15.0  # at most, for the names of fleets


def run(options: DeviceOptions, tell: Callable[[DeviceEvent], None], workers: Workers | None = None) -> None:
    """Take part in a fleet as one device, until the fleet has finished, or for ever.

    Args:
        options: the command line.
        tell: gets every event, for the screen.
        workers: planner and trainer; None: this package's own.

    Raises:
        InputError: the data or a held-out file cannot be used, the state is another device's, or
            another agent has this device's id.
        UnreachableError: no broker, or no round was announced in time.
        EdgeError: this device cannot take part: every model, or every plan failed.
    """
    store, rows = _open(options)
    presence = PresenceSpec(options.fleet, options.id, int(store.get("epoch") or 0))
    client = topics.client_id("device", options.fleet, options.id)
    session = Session(options.broker, client, presence=presence)
    workers = workers or Workers(partial(find_plan, options=options), Trainer)
    rounds = Rounds(session, store, options, rows, workers, tell)
    try:
        _connect(session, rounds, options)
        while (stage := rounds.stage) != "finished":
            # the node has to be heard of until then
            until = stage.until if isinstance(stage, Waiting | Owing) else math.inf
            patience_s = until - time.monotonic()
            if patience_s <= 0:
                raise UnreachableError(_silence(stage, session, options))
            item = session.receive(max(min(rounds.tick(), IDLE_S, patience_s), 0.0))
            rounds.handle(item)
            if isinstance(item, Message):
                _hear(item, session, store, options, rounds)
    finally:
        rounds.close()
        session.close()
        store.connection.close()


def _open(options: DeviceOptions) -> tuple[DeviceStore, DeviceRows]:
    """Check the rows before a state is made, and whose state it is before rows are written there."""
    given = DeviceRows(options.data, options.evaluation)
    given.check()
    store = DeviceStore(options.state / "agent.db")
    store.claim(options)
    return store, given.with_held_out(options.state.resolve() / "work")


def _connect(session: Session, rounds: Rounds, options: DeviceOptions) -> None:
    try:
        session.connect(CONNECT_TIMEOUT_S)
        session.subscribe(topics.round(options.fleet))
        rounds.start()
    except BrokerError as error:
        raise UnreachableError(str(error)) from error
    rounds.say("connected", text=str(options.broker))
    rounds.stage = Waiting(time.monotonic() + options.wait_s)


def _hear(
    message: Message, session: Session, store: DeviceStore, options: DeviceOptions, rounds: Rounds
) -> None:
    """A node speaks to all devices, or to this process alone: that it has to end."""
    if message.topic == topics.round(options.fleet):
        _follow(message.payload, store, rounds)
        # the node asks who is there; presence has just been published where the broker kept the round
        if not message.retained:
            session.show_online()
    elif message.topic == topics.inbox(options.fleet, options.id, session.process):
        raise InputError(
            f"another agent is connected to {options.broker} as device `{options.id}` of fleet `{options.fleet}`, and the "
            "two have taken over each other's connection: give every device an --id of its own"
        )


def _follow(payload: bytes, store: DeviceStore, rounds: Rounds) -> None:
    """Check who announced a round: a device that has trained for a node follows no other."""
    try:
        body, key = signing.open(payload, ROUND_DOMAIN, store.get("node_key"))
        announced = messages.decode(body, Round)
    except BadMessage as error:
        log.warning("ignored a round: %s", error)
        if isinstance(rounds.stage, Waiting):
            ignored = f"a round was announced, but {error}"
            if isinstance(error, WrongKey):
                ignored += "; to trust that node, start with a new --state"
            rounds.stage = rounds.stage._replace(ignored=ignored)
        return
    rounds.announce(announced, key)


def _silence(stage: Stage, session: Session, options: DeviceOptions) -> str:
    """Why the agent ends without word of its node."""
    if isinstance(stage, Waiting):
        return stage.ignored or _no_round(session, options)
    return (
        f"fleet `{options.fleet}` has finished, but its node has not answered the last update within "
        f"{options.wait_s:g} s; the update is kept: start the agent again while `edge-runtime aggregator` runs"
    )


def _no_round(session: Session, options: DeviceOptions) -> str:
    """No round of the fleet was announced: name the fleets that are."""
    session.subscribe(topics.round(topics.ANY))
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
