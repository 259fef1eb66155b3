"""The node's signed and retained message about the open round, and the files that it names."""

from collections.abc import Mapping
from itertools import chain
from pathlib import Path

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from edge_broker import signing, topics
from edge_broker.errors import BrokerError
from edge_broker.messages import Artifact
from edge_broker.session import Connected, Event, Message, Session, Unsent
from edge_broker.transfer import Publisher

from edge_runtime.aggregator.store import Version
from edge_runtime.errors import UnreachableError
from edge_runtime.protocol.round import ROUND_DOMAIN, Round
from edge_runtime.settings import Fleet


class Announcer:
    """Announces rounds, whose versions and public texts a publisher serves to devices."""

    def __init__(
        self, session: Session, publisher: Publisher, fleet: Fleet, node: str, key: Ed25519PrivateKey
    ) -> None:
        self._session, self._publisher, self._node, self._key = session, publisher, node, key
        if fleet.public is not None:
            # devices do not see in which folder of the node the file lies
            spec = msgspec.structs.replace(fleet.public, file=Path(fleet.public.file).name)
            fleet = msgspec.structs.replace(fleet, public=spec)
        self._fleet, self._topic = fleet, topics.round(fleet.name)
        self._served: dict[str, tuple[Artifact, ...]] = {}
        self._message = b""
        self._pending = False  # the connection had no room for the message

    def announce(self, round_: int, versions: Mapping[str, Version], texts: Path | None) -> None:
        """Serve these versions instead of the last ones, and announce the round.

        Args:
            round_: from 1; one past the fleet's rounds announces that the fleet is finished.
            texts: file of the fleet's public texts.
        """
        for artifact in chain.from_iterable(self._served.values()):
            self._publisher.withdraw(artifact.digest)
        served_texts = self._publisher.serve(texts) if texts is not None else None
        self._served = {
            name: tuple(map(self._publisher.serve, version.chain)) for name, version in versions.items()
        }
        announced = Round(
            node=self._node,
            state="open" if round_ <= self._fleet.rounds else "finished",
            round=min(round_, self._fleet.rounds),
            fleet=self._fleet,
            versions=self._served,
            texts=served_texts,
        )
        self._message = signing.sign(self._key, ROUND_DOMAIN, msgspec.json.encode(announced))
        self._publish()

    def handle(self, item: Message | Event | None) -> None:
        """Publish the message again where the broker may have lost it, or had no room for it.

        Comes before the publisher, whose chunks take the room.

        Raises:
            UnreachableError: the broker refuses the message.
        """
        if isinstance(item, Unsent) and item.topic == self._topic:
            raise UnreachableError(f"the round cannot be announced on {item.topic}: {item.reason}")
        if self._pending or isinstance(item, Connected):
            self._publish()

    def _publish(self) -> None:
        try:
            # without waiting for the broker, so that an outage is noticed
            self._pending = not self._session.publish_nowait(self._topic, self._message, retain=True)
        except BrokerError as error:
            raise UnreachableError(str(error)) from error
