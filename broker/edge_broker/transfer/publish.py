"""The node's side of a global adapter's way down: each chunk once for all who listen.

A want is held for 50 ms, so that devices which ask at about the same time are served by one publication. Chunks asked
for again while they wait to be sent are sent once; those already gone join the end of the queue, for all latecomers
together.
"""

import logging
import time
from itertools import islice
from pathlib import Path

from edge_broker import messages, topics
from edge_broker.errors import BadMessage, Refused
from edge_broker.events import Event, Message
from edge_broker.messages import Artifact, Want
from edge_broker.session import Session
from edge_broker.transfer.pace import IDLE_S

_GATHER_S = 0.05
_EXPIRY_S = 120  # what a device did not get by then it asks for again

log = logging.getLogger(__name__)


class Publisher:
    """Serves files to the devices of a fleet."""

    def __init__(self, session: Session, fleet: str) -> None:
        """Prepare; call `start` once connected."""
        self._session, self._fleet = session, topics.name("fleet", fleet)
        self._served: dict[str, tuple[Artifact, Path]] = {}
        self._queue: dict[tuple[str, int], None] = {}  # (digest, chunk), in the order to send
        self._begin_at = 0.0
        self.published = 0  # chunks, since the beginning

    def start(self) -> None:
        """Subscribe to the fleet's wants."""
        self._session.subscribe(topics.all_wants(self._fleet))

    def serve(self, path: Path, chunk_bytes: int | None = None) -> Artifact:
        """Serve this file from now on; it must stay unchanged until `withdraw`.

        Args:
            path: the global adapter.
            chunk_bytes: how to cut it; by default what the session's broker takes.

        Returns:
            The pointer that devices need, for the round's announcement.

        Raises:
            BrokerError: the file is empty.
        """
        digest, size = messages.digest_and_size(path)
        chunk_bytes = chunk_bytes or self._session.chunk_bytes
        artifact = Artifact(digest=digest, size=size, chunk_bytes=chunk_bytes, chunks=-(-size // chunk_bytes))
        self._served[digest] = (artifact, path)
        return artifact

    def withdraw(self, digest: str) -> None:
        """Stop serving a file."""
        self._served.pop(digest, None)
        self._queue = {key: None for key in self._queue if key[0] != digest}

    def handle(self, message: Message | Event | None) -> None:
        """Take in what the session received; anything that is not a want is ignored, malformed ones are logged."""
        if isinstance(message, Message):
            try:
                where = topics.parse(message.topic)
                if where.kind == "want" and where.fleet == self._fleet:
                    self._wanted(where.device, messages.decode(message.payload, Want))
            except BadMessage as error:
                log.warning("ignored a message on %s: %s", message.topic, error)
        self.tick()

    def tick(self, now: float | None = None) -> float:
        """Publish what is wanted, as far as the window has room (now: of time.monotonic).

        Returns:
            Seconds until the next tick is of use.
        """
        now = time.monotonic() if now is None else now
        if not self._queue:
            return IDLE_S
        if now < self._begin_at:
            return self._begin_at - now
        while self._queue:
            digest, index = next(iter(self._queue))
            artifact, path = self._served[digest]
            try:
                with path.open("rb") as file:
                    file.seek(index * artifact.chunk_bytes)
                    data = file.read(messages.chunk_size(artifact, index))
                if not self._session.publish_nowait(
                    topics.artifact(self._fleet, digest, index), data, expiry_s=_EXPIRY_S
                ):
                    break
            except (OSError, Refused) as error:
                log.error("serves %s no longer: %s", path, error)
                self.withdraw(digest)
                continue
            del self._queue[digest, index]
            self.published += 1
        return IDLE_S

    def _wanted(self, device: str, want: Want) -> None:
        served = self._served.get(want.digest)
        if not served:
            log.info("%s wants %s…, which is not served here", device, want.digest[:16])
            return
        if not self._queue:
            self._begin_at = time.monotonic() + _GATHER_S
        chunks = served[0].chunks
        for index in islice(
            messages.from_ranges(want.missing, chunks), chunks
        ):  # ranges may repeat each other
            self._queue[want.digest, index] = None
