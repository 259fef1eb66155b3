"""The node's signed and retained message about the open round, and the files that it names."""

from collections.abc import Mapping
from pathlib import Path

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from edge_broker import signing, topics
from edge_broker.errors import BrokerError
from edge_broker.messages import Artifact
from edge_broker.session import Event, Message, Session, Unsent
from edge_broker.transfer import Publisher

from edge_runtime.aggregator.store import Version
from edge_runtime.errors import UnreachableError
from edge_runtime.protocol.round import ROUND_DOMAIN, Round
from edge_runtime.settings import Fleet


class Announcer:
    """Announces rounds, and serves their versions and public texts to devices."""

    def __init__(self, session: Session, fleet: Fleet, node: str, key: Ed25519PrivateKey) -> None:
        self._session, self._fleet, self._node, self._key = session, fleet, node, key
        self._publisher = Publisher(session, fleet.name)
        self._topic = topics.round(fleet.name)
        self._served: dict[str, Artifact] = {}
        self._message = b""
        self._pending = False  # the connection had no room for the message

    def start(self) -> None:
        """Subscribe to what devices ask for."""
        self._publisher.start()

    def tick(self) -> float:
        """Send chunks that are due. Returns seconds until the next call is needed."""
        return self._publisher.tick()

    def announce(self, round_: int, versions: Mapping[str, Version], texts: Path | None) -> None:
        """Serve these versions instead of the last ones, and announce the round.

        Args:
            round_: from 1; one past the fleet's rounds announces that the fleet is finished.
            texts: file of the fleet's public texts.
        """
        for digest in {artifact.digest for artifact in self._served.values()}:
            self._publisher.withdraw(digest)
        anchors = self._publisher.serve(texts) if texts is not None else None
        self._served = {name: self._publisher.serve(version.artifact) for name, version in versions.items()}
        announced = Round(
            node=self._node,
            state="open" if round_ <= self._fleet.rounds else "finished",
            round=min(round_, self._fleet.rounds),
            fleet=_without_folders(self._fleet),
            versions=self._served,
            anchors=anchors,
        )
        self._message = signing.sign(self._key, ROUND_DOMAIN, msgspec.json.encode(announced))
        self.publish()

    def publish(self) -> None:
        """Hand the message over without waiting for the broker, so that an outage is noticed."""
        try:
            self._pending = not self._session.publish_nowait(self._topic, self._message, retain=True)
        except BrokerError as error:
            raise UnreachableError(str(error)) from error

    def publish_pending(self) -> None:
        """Publish a message that found no room; before `handle`, whose chunks take the room."""
        if self._pending:
            self.publish()

    def handle(self, item: Message | Event | None) -> None:
        """Take an item of the queue; raises UnreachableError where the broker refused the message."""
        self._publisher.handle(item)
        if isinstance(item, Unsent) and item.topic == self._topic:
            raise UnreachableError(f"the round cannot be announced on {item.topic}: {item.reason}")


def _without_folders(fleet: Fleet) -> Fleet:
    """The fleet as devices get it: without the folder of a file on the node."""
    if fleet.codistill is None:
        return fleet
    name = Path(fleet.codistill.anchors).name
    return msgspec.structs.replace(fleet, codistill=msgspec.structs.replace(fleet.codistill, anchors=name))
