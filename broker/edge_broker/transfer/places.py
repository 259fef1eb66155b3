"""Which transfers have chunks under way to a node, and whether there is a place for another one."""

import time

from edge_broker.messages import Manifest

CREDIT = 64  # chunks a grant
UNDER_WAY = 768  # granted chunks that have not arrived, over all transfers
_SILENT_S = 30.0  # a transfer without a chunk for so long gives its place to another


class Active:
    """A transfer with chunks under way."""

    def __init__(self, manifest: Manifest, granted: list[int]) -> None:
        self.manifest = manifest
        self.granted = set(granted)  # chunks that have not arrived
        self.last = time.monotonic()  # when its last chunk arrived


class Places:
    """The active transfers of one node, by name."""

    def __init__(self) -> None:
        self._active: dict[str, Active] = {}

    def has_room(self, manifest: Manifest) -> bool:
        """Whether the transfer is active or may become so; silent transfers lose their places."""
        oldest = time.monotonic() - _SILENT_S
        for silent in [name for name, active in self._active.items() if active.last < oldest]:
            del self._active[silent]
        taken = sum(min(CREDIT, active.manifest.chunks) for active in self._active.values())
        return manifest.transfer in self._active or taken + min(CREDIT, manifest.chunks) <= UNDER_WAY

    def find(self, transfer: str) -> Active | None:
        """The transfer if it is active."""
        return self._active.get(transfer)

    def take(self, manifest: Manifest, granted: list[int]) -> Active:
        """Give the transfer a place, with these chunks under way."""
        active = self._active[manifest.transfer] = Active(manifest, granted)
        return active

    def free(self, transfer: str) -> None:
        """Give up the place of a transfer, if it has one."""
        self._active.pop(transfer, None)
