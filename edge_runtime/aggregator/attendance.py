"""Which devices are there, and so for whom a round waits.

The broker keeps every device's last presence. Where a device and the broker lose power together,
nobody publishes the device's will, and `online` stays for good. So that word alone makes a device
wanted for only as long as MQTT leaves a silent client: one and a half times its keep-alive, from
the moment that the node has asked. From then on the round waits for devices that the node has heard
itself since it connected: by any message that the broker did not keep. The node asks by announcing
the round, which it does whenever it connects; an agent answers with its presence, also while its
trainer works. A device that answers late, or comes back, is wanted again at once.

Why so: the epoch in a presence is the same for a ghost and for a device that connected before the
node. A time limit on silence would have to guess how long a machine trains. A ping would be one more
message to the same devices that hear the announcement.

Two agents with one id take over each other's connection for ever, and few brokers tell them why.
The node sees it: each agent's process has a random name, and both come back after the other. The
one that comes back after an elder is told to end. The elder is the one whose reports bear the key
that the node knows, else the one that was there first. A process that has died never comes back,
so an agent may be started again at any time.
"""

import itertools
import math
import time

from edge_broker import messages, presence, topics
from edge_broker.connection import KEEPALIVE_S
from edge_broker.session import Connected, Event, Message, Session

ANSWER_S = 1.5 * KEEPALIVE_S  # after which a broker takes a silent client for lost (MQTT 5, 3.1.2.10)
_PROCESSES = 8  # remembered of a device

Rank = tuple[bool, int]  # of a process: whether its key is still unknown, and a number that grows


class Attendance:
    """The presence of a fleet's devices, as one node has it."""

    def __init__(self, session: Session, fleet: str) -> None:
        """session: to tell an agent to end."""
        self._session, self._fleet = session, fleet
        self._tracker = presence.Tracker()
        self._heard: set[str] = set()  # devices, since the node connected
        self._due = math.inf  # when the answers are due, in monotonic time
        self._silence_logged = False  # of the devices that have not answered
        self._numbers = itertools.count()
        # of each device; the process that was online last comes last, and the elder has the lower rank
        self._processes: dict[str, dict[str, Rank]] = {}
        self._vouched: dict[str, str] = {}  # process of a device's report that came before its presence

    @property
    def known(self) -> set[str]:
        """Every device that has a presence."""
        return set(self._tracker.devices)

    @property
    def present(self) -> set[str]:
        """The devices that are there."""
        return self._online if time.monotonic() < self._due else self._online & self._heard

    @property
    def due_s(self) -> float:
        """Seconds until `present` may change by itself; infinite if it cannot."""
        left_s = self._due - time.monotonic()
        return left_s if left_s > 0 else math.inf

    def handle(self, item: Message | Event | None) -> list[str]:
        """Take in an event of the session, None too. Returns what there is to tell the operator.

        Raises:
            BadMessage: the message is on none of the link's topics, or a malformed presence.
        """
        if isinstance(item, Connected):
            self._heard.clear()
            self._due, self._silence_logged = time.monotonic() + ANSWER_S, False
        elif isinstance(item, Message):
            return self._listen(item)
        if self._silence_logged or time.monotonic() < self._due:
            return []
        self._silence_logged = True
        word = f"is online for the broker, but has not answered in {ANSWER_S:g} s: no round waits for it"
        return [f"{name} {word}" for name in sorted(self._online - self._heard)]

    def vouch(self, device: str, process: str) -> None:
        """A report of the process was signed with the device's key."""
        processes = self._processes.get(device, {})
        if process in processes:
            processes[process] = (False, processes[process][1])
        else:
            self._vouched[device] = process

    @property
    def _online(self) -> set[str]:
        return {name for name, latest in self._tracker.devices.items() if latest.state == "online"}

    def _listen(self, message: Message) -> list[str]:
        source, news = topics.parse(message.topic), []
        if not message.retained and source.device:
            self._heard.add(source.device)
        if source.kind == "presence":
            if self._tracker.handle(message.topic, message.payload):
                news.append(f"{source.device} is {self._tracker.state(source.device)}")
            # an earlier process may have the lower epoch, where clocks differ: the tracker skips it
            latest = messages.decode(message.payload, messages.Presence) if message.payload else None
            if latest and latest.state == "online" and self._intrudes(source.device, latest.process):
                news.append(self._end(source.device, latest.process))
        return news

    def _intrudes(self, device: str, process: str) -> bool:
        """Whether the process, now online, has come back after an elder one."""
        processes = self._processes.setdefault(device, {})
        last = next(reversed(processes), process)
        before = processes.pop(process, None)
        processes[process] = before or (self._vouched.get(device) != process, next(self._numbers))
        if len(processes) > _PROCESSES:
            del processes[next(iter(processes))]
        return before is not None and processes[last] < before

    def _end(self, device: str, process: str) -> str:
        """Tell one of two agents to end."""
        reason = f"another agent has taken over the id {device}"
        order = messages.encode(messages.Reject(process, "taken-over", reason, final=True))
        self._session.publish_nowait(topics.inbox(self._fleet, device, process), order)
        return f"two agents have the id {device}: one is told to end; give every device an --id of its own"
