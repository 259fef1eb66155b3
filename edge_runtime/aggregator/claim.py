"""Whether this node may serve its fleet: a broker has one node of a fleet.

    arriving -> serving -> arriving at each new connection
    arriving or serving -> InputError: another node was there first, and lives

The nodes of a fleet share one retained topic for their presence, with a random name of each process.
A broker hands on the messages of a topic in one order, so a node was there first if its presence
comes before this node's own. A node that hears of another answers with its presence, and whoever
gets such an answer from a node that was there first ends: also one that was cut off while another
took its place. No clocks are compared.

After a kill the broker publishes the will, and the next process serves at once. Where node and broker
lost power together, `online` stays, and nobody answers. So a node waits for an answer only as long
as MQTT leaves a silent client, and then serves.
"""

import logging
import math
import time

from edge_broker import messages, topics
from edge_broker.errors import BadMessage, BrokerError, Refused
from edge_broker.session import Connected, Disconnected, Event, Message, Session, Unsent

from edge_runtime.aggregator.attendance import ANSWER_S
from edge_runtime.errors import InputError, UnreachableError

log = logging.getLogger(__name__)


class Claim:
    """A node's claim to its fleet; the session's presence is the fleet's node's."""

    def __init__(self, session: Session, fleet: str) -> None:
        self._session, self._fleet, self._topic = session, fleet, topics.node(fleet)
        self._arrival: Connected | None = None  # held back while arriving
        self._due = math.inf  # when it is let through at the latest, in monotonic time
        self._shown = False  # this connection's presence has come back
        self._elder = ""  # process that was there first, and has not shown that it lives
        self._heard: set[tuple[str, int, str]] = set()  # messages of other processes that were answered

    @property
    def due_s(self) -> float:
        """Seconds until the wait for an answer is over; infinite outside of it."""
        return max(self._due - time.monotonic(), 0.0)

    def admit(self, item: Message | Event | None) -> list[Message | Event | None]:
        """What of the session's next item is the node's: a Connected only once it may serve.

        Raises:
            InputError: another node serves the fleet.
            UnreachableError: the broker does not let this node publish and read its presence.
        """
        items = [item]
        if isinstance(item, Connected):
            items, self._arrival, self._due = [], item, time.monotonic() + ANSWER_S
            self._shown, self._elder = False, ""
            self._show()
        elif isinstance(item, Disconnected):
            self._arrival, self._due = None, math.inf
        elif isinstance(item, Unsent) and item.topic == self._topic:
            raise UnreachableError(f"this node cannot show its presence on {item.topic}: {item.reason}")
        elif isinstance(item, Message) and item.topic == self._topic:
            items = []
            try:
                self._hear(item)
            except BadMessage as error:
                log.warning("ignored a message on %s: %s", item.topic, error)
        if self._arrival and (self.due_s == 0 or (self._shown and not self._elder)):
            items.append(self._arrive())
        return items

    def _show(self) -> None:
        """Listen, then speak: rumqttd may swap the two unless its answer comes in between."""
        try:
            self._session.subscribe(self._topic)
            self._session.show_online()
        except Refused as error:
            raise UnreachableError(str(error)) from error
        except BrokerError as error:  # the connection is gone again
            log.warning("%s", error)

    def _arrive(self) -> Connected | None:
        """From now on the node may serve."""
        if not self._shown:
            raise UnreachableError(
                f"the broker took this node's presence on {self._topic}, but has not handed it back in "
                f"{ANSWER_S:g} s: its access rules must let the node read and write that topic"
            )
        if self._elder:
            log.warning("no answer in %g s: that node is not there, and this one serves", ANSWER_S)
        arrival, self._arrival, self._due = self._arrival, None, math.inf
        return arrival

    def _hear(self, message: Message) -> None:
        """A node's presence, perhaps this node's own, or an operator has deleted it."""
        if not message.payload:
            return
        latest = messages.decode(message.payload, messages.Presence)
        if latest.process == self._session.process:
            if self._arrival and latest.epoch == self._arrival.epoch:
                self._shown = True
                if self._elder:
                    word = "for the broker fleet `%s` has a node already: waiting up to %g s for its answer"
                    log.warning(word, self._fleet, ANSWER_S)
            return
        first = latest.process == self._elder or (self._arrival is not None and not self._shown)
        if latest.state != "online":
            self._elder = "" if latest.process == self._elder else self._elder
        elif first and not message.retained:
            raise InputError(
                f"fleet `{self._fleet}` has another node at this broker, and devices would follow two: end that one "
                "first, or give this one a fleet of its own, by [fleet] name"
            )
        elif first:
            self._elder = latest.process
        self._answer(latest, message.retained)

    def _answer(self, latest: messages.Presence, retained: bool) -> None:
        """Show this node to one that came later; its last word must not stay on the topic either."""
        news = (latest.process, latest.epoch, latest.state)
        if retained or not self._shown or news in self._heard:
            return
        self._heard.add(news)
        if latest.state == "online":
            log.warning("another node of fleet `%s` has come: it is told to end", self._fleet)
        self._session.show_online()
