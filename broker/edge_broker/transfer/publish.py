"""The node's side of a download: publishes each chunk once for all devices that listen.

A want waits 50 ms, so that devices which ask at about the same time share a publication. A chunk
that is asked for while it is queued is sent once. A chunk that was sent before joins the end of the
queue.
"""

import logging
import time
from itertools import islice
from pathlib import Path

from edge_broker import chunks, messages, topics
from edge_broker.errors import BadMessage, Refused
from edge_broker.events import Event, Message, Unsent
from edge_broker.messages import Artifact, Want
from edge_broker.session import Session
from edge_broker.transfer.pace import IDLE_S

_GATHER_S = 0.05
_EXPIRY_S = 120  # in the broker's queue; a device asks again before

log = logging.getLogger(__name__)


class Publisher:
    """Serves files to the devices of a fleet."""

    def __init__(self, session: Session, fleet: str) -> None:
        """Prepare; call `start` once connected."""
        self._session, self._fleet = session, topics.name("fleet", fleet)
        self._served: dict[str, tuple[Artifact, Path]] = {}
        self._queue: dict[tuple[str, int], None] = {}  # (digest, chunk), in the order to send
        self._begin_at = 0.0  # monotonic: when devices have had time to ask for the same chunks

    def start(self) -> None:
        """Subscribe to the fleet's wants."""
        self._session.subscribe(topics.want(self._fleet, topics.ANY))

    def serve(self, path: Path) -> Artifact:
        """Serve this file from now on; it must stay unchanged until `withdraw`, and not be empty.

        Returns the pointer for the round's announcement.
        """
        digest, size = messages.digest_and_size(path)
        chunk_bytes = self._session.chunk_bytes
        artifact = Artifact(digest=digest, size=size, chunk_bytes=chunk_bytes, chunks=-(-size // chunk_bytes))
        self._served[digest] = (artifact, path)
        return artifact

    @property
    def outgrown(self) -> bool:
        """Whether chunks are larger than the broker takes: serve the files again, and announce that."""
        limit = self._session.chunk_bytes
        return any(artifact.chunk_bytes > limit for artifact, _ in self._served.values())

    def withdraw(self, digest: str) -> None:
        """Stop serving a file."""
        self._served.pop(digest, None)
        self._queue = {key: None for key in self._queue if key[0] != digest}

    def handle(self, message: Message | Event | None) -> None:
        """Take a message of the session. Other topics are ignored, malformed wants are logged."""
        if isinstance(message, Message):
            try:
                source = topics.parse(message.topic)
                if source.kind == "want" and source.fleet == self._fleet:
                    self._enqueue(source.device, messages.decode(message.payload, Want))
            except BadMessage as error:
                log.warning("ignored a message on %s: %s", message.topic, error)
        # a larger packet than the broker takes by now was cut before, and comes again in smaller chunks
        elif isinstance(message, Unsent) and 0 < message.too_large <= self._session.packet_max:
            self._give_up(topics.parse(message.topic).digest, message.reason)
        self.tick()

    def tick(self) -> float:
        """Publish queued chunks while there is room. Returns seconds until the next useful tick."""
        now = time.monotonic()
        if self._queue and now < self._begin_at:
            return self._begin_at - now
        while self._queue:
            digest, index = next(iter(self._queue))
            artifact, path = self._served[digest]
            topic = topics.artifact(self._fleet, digest, index)
            try:
                data = chunks.read(path, artifact, index)
                if not self._session.publish_nowait(topic, data, expiry_s=_EXPIRY_S):
                    break
                del self._queue[digest, index]
            except (OSError, Refused) as error:
                if isinstance(error, Refused) and self.outgrown:
                    break
                self._give_up(digest, str(error))
        return IDLE_S

    def _give_up(self, digest: str, reason: str) -> None:
        if digest in self._served:
            log.error("serves %s no longer: %s", self._served[digest][1], reason)
            self.withdraw(digest)

    def _enqueue(self, device: str, request: Want) -> None:
        if request.digest not in self._served:
            log.info("%s wants %s…, which is not served here", device, request.digest[:16])
            return
        if not self._queue:
            self._begin_at = time.monotonic() + _GATHER_S
        count = self._served[request.digest][0].chunks
        # ranges may repeat each other: no more indices than chunks are taken
        for index in islice(chunks.from_ranges(request.missing, count), count):
            self._queue[request.digest, index] = None
