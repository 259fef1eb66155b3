"""What an agent does with each new version on its device: a server answers with it, a hook hears of it.

A trainer writes a version into the state's adapter folder: at its start the version that the round
starts from, or the last one that it evaluates. The agent looks at the folder when the trainer gives
a sign of life, and remembers over restarts what it has seen.
"""

from collections.abc import Callable
from pathlib import Path

import msgspec

from edge_runtime.agent.hook import Hook, HookEnded
from edge_runtime.agent.options import DeviceOptions
from edge_runtime.agent.server import BaseChoice, Server, ServerEnded
from edge_runtime.agent.store import DeviceStore
from edge_runtime.protocol.plan import Plan
from edge_runtime.serving.event import ServerEvent
from edge_runtime.state import stamp


class NewestVersion:
    """Server and hook of one device; used from the agent's thread."""

    def __init__(
        self, options: DeviceOptions, folder: Path, store: DeviceStore, post: Callable[[object], None]
    ) -> None:
        """Go on with the version that an earlier agent has left, if there is one.

        Args:
            options: whether there is a server or a hook.
            folder: of the newest version, in the agent's state.
            store: remembers the version that was seen last, and its base.
            post: takes events of both, in other threads, to be handed to `handle`.
        """
        self._folder, self._store = folder, store
        self._server = Server(options, options.serve, folder, post) if options.serve else None
        self._hook = Hook(options.on_version, options.state, post) if options.on_version else None
        if self._server is not None and folder.exists() and (base := store.get("served")):
            self._server.start(msgspec.json.decode(base, type=BaseChoice))
        # a command that an earlier agent began may not have come to its end
        if self._hook is not None and folder.exists():
            self._hook.run()

    def look(self, plan: Plan) -> None:
        """Serve and tell the version in the folder, if it is new. plan: of the trainer that wrote it."""
        place = stamp(self._folder)
        seen = "{}/{}".format(*place)
        if not any(place) or seen == self._store.get("version_seen"):
            return
        base = BaseChoice(plan.source, plan.depth, plan.weights, plan.server or "torch")
        self._store.set("served", msgspec.json.encode(base).decode())
        if self._server is not None:
            self._server.start(base)
        if self._hook is not None:
            self._hook.run()
        self._store.set("version_seen", seen)

    def handle(self, item: object) -> str | None:
        """Take in an event that was posted; what to tell of it."""
        if isinstance(item, ServerEnded) and self._server is not None:
            return self._server.ended(item)
        return item.text if isinstance(item, ServerEvent | HookEnded) else None

    def tick(self) -> float:
        """Do what is due; seconds until the next call is of use."""
        return self._server.tick() if self._server is not None else float("inf")

    def stop(self) -> None:
        """End the server; a command of the hook runs on."""
        if self._server is not None:
            self._server.stop()
