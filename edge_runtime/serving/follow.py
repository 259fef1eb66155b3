"""Takes each newer version that appears in an adapter's folder into a running engine.

The folder is replaced as a whole (adapters/learned.py); the file that names its version is looked
at a few times a second. Nobody has to tell the server, and nothing is lost when either process is
killed.
"""

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from edge_runtime.adapters import learned
from edge_runtime.errors import EdgeError
from edge_runtime.models.facts import Facts
from edge_runtime.serving.engine import Engine
from edge_runtime.serving.event import ServerEvent
from edge_runtime.state import stamp

log = logging.getLogger(__name__)
LOOK_S = 0.2  # between two looks
PATIENCE = 25  # looks at a folder that cannot be read before it is told: it may be half replaced


class Follower:
    """A thread that swaps versions for as long as the process lives."""

    def __init__(
        self,
        engine: Engine,
        facts: Facts,
        folder: Path,
        first: tuple[int, int],
        tell: Callable[[ServerEvent], None],
    ) -> None:
        """Start the thread.

        Args:
            engine: answers with a version already.
            facts: of its base.
            folder: where newer versions appear.
            first: the folder's stamp before that version was read.
            tell: gets an event for each newer version, in this thread.
        """
        self._engine, self._facts, self._folder, self._tell = engine, facts, folder, tell
        self._seen, self._failures = first, 0
        threading.Thread(target=self._run, name="follow", daemon=True).start()

    def _run(self) -> None:
        while True:
            time.sleep(LOOK_S)
            seen = stamp(self._folder)
            if seen not in (self._seen, (0, 0)):
                self._take(seen)

    def _take(self, seen: tuple[int, int]) -> None:
        # of any kind, such as a device's memory that ran out: the thread has to outlive a version
        try:
            newer = learned.on(learned.read(self._folder), self._facts)
        except Exception as error:
            self._failures += 1
            if self._failures == PATIENCE:
                self._refuse(seen, error)
            return
        try:
            self._engine.swap(newer)
        except Exception as error:
            self._refuse(seen, error)
            return
        version = self._engine.version
        self._settle(seen, ServerEvent("version", version, f"new requests take version {version}"))

    def _refuse(self, seen: tuple[int, int], error: Exception) -> None:
        text = str(error) if isinstance(error, EdgeError) else f"a version failed: {error!r}"
        self._settle(seen, ServerEvent("refused", self._engine.version, text))

    def _settle(self, seen: tuple[int, int], event: ServerEvent) -> None:
        """Be done with the folder as it was seen, and tell of it."""
        self._seen, self._failures = seen, 0
        try:
            self._tell(event)
        # whoever listened went away
        except Exception as error:
            log.warning("an event could not be told: %r", error)
