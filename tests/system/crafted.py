"""A device written by hand over the real link, which can report and offer whatever it likes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
from edge_broker import messages, presence, signing, store, topics
from edge_broker.outbox import Outbox
from edge_broker.session import Session
from edge_broker.transfer import Committed, Rejected, Uploader
from fleet import Fleet

from edge_runtime.protocol.report import REPORT_DOMAIN, Report
from edge_runtime.protocol.round import CODEC


class Crafted:
    """One such device; `crafted` makes it and closes it."""

    def __init__(self, fleet: Fleet, id: str) -> None:
        self._fleet, self._id = fleet.name, id
        folder = fleet.folder / id
        self._key = signing.load_or_create_key(folder / "key")
        node_key = signing.load_or_create_key(fleet.folder / "node" / "node.key")
        self._node_key = signing.public_key(node_key)
        spec = presence.PresenceSpec(fleet.name, id)
        self.session = Session(fleet.broker.url, f"{fleet.name}-{id}", presence=spec)
        self._folder = folder
        self._outbox = Outbox(store.connect(folder / "outbox.db"), folder)
        self._uploader = Uploader(self.session, self._outbox, fleet.name, id, self._key)
        self.session.connect(10)
        self._uploader.start()

    def report(self, **fields: Any) -> None:
        """Publish a signed report; the node pins the key of the first one."""
        report = Report(
            device=self._id,
            **{"node_key": self._node_key, "round": 1, "state": "joined", "budget_bytes": 0, **fields},
        )
        signed = signing.sign(self._key, REPORT_DOMAIN, msgspec.json.encode(report))
        self.session.publish(topics.report(self._fleet, self._id), signed, retain=True)

    def offer(self, payload: bytes, **fields: Any) -> Committed | Rejected:
        """Send a payload and return the node's final word on it."""
        described: dict[str, Any] = {
            "round": 1,
            "model_class": "crafted",
            "codec": CODEC,
            "samples": 4,
            **fields,
        }
        origin = messages.Origin(fleet=self._fleet, device=self._id, **described)
        file = self._folder / "payload"
        file.write_bytes(payload)
        self._outbox.add(messages.describe(file, origin, self.session.chunk_bytes), file)
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            settled = self._uploader.handle(self.session.receive(min(self._uploader.tick(), 1.0)))
            if isinstance(settled, Committed) or (isinstance(settled, Rejected) and settled.final):
                return settled
        raise AssertionError("the node said nothing final")


@contextmanager
def crafted(fleet: Fleet, id: str) -> Iterator[Crafted]:
    """A connected device that the node has not heard of yet."""
    device = Crafted(fleet, id)
    try:
        yield device
    finally:
        device.session.close()
