"""The node of a run: its global versions, and how far each round moves them."""

from pathlib import Path

from edge_broker.journal import Update
from safetensors.numpy import load_file

from edge_runtime.aggregator import merge
from edge_runtime.aggregator.store import Version
from edge_runtime.methods.interface import Method
from edge_runtime.protocol.keys import STATE, kind_of
from edge_runtime.protocol.round import FLEET
from edge_runtime.settings import Fleet
from edge_runtime.simulation.agreement import cosines
from edge_runtime.simulation.results import mean, short


class Versions:
    """The latest version of each model class."""

    def __init__(self, fleet: Fleet, method: Method, folder: Path) -> None:
        self.fleet, self.method, self.folder = fleet, method, folder
        self.by_class: dict[str, Version] = {}
        self.moved: list[float] = []  # as an Outcome has it
        self.cosines: list[tuple[float, float]] = []  # as an Outcome has it

    def latest(self, model_class: str) -> Version | None:
        """The version that devices of a class start from; None before the first merge."""
        return self.by_class.get(model_class, self.by_class.get(FLEET))

    def merge(self, updates: list[Update], round_: int) -> None:
        """Make the next versions of a round's updates."""
        if not updates:
            return
        pairs = cosines(updates, self.method)
        if pairs:
            below_0 = sum(pair < 0 for pair in pairs) / len(pairs)
            self.cosines.append((short(mean(pairs)), short(below_0)))
        merged = merge.merge(updates, self.by_class, self.fleet, self.method, round_, self.folder)
        if not self.method.refactored:  # the same product in other factors would count as a move
            self.moved.append(short(sum(map(self._moved_by, merged))))
        self.by_class |= {version.model_class: version for version in merged}

    def _moved_by(self, version: Version) -> float:
        """Squared norm of a version's difference to the version before it."""
        total, before = 0.0, self.by_class.get(version.model_class)
        old = load_file(before.master) if before is not None else {}
        for key, value in load_file(version.master).items():
            if kind_of(key) in STATE:
                start = old.get(key)
                start = merge.version_0(key, value.shape, self.fleet, self.method) if start is None else start
                total += float(((value - start) ** 2).sum(dtype="float64"))
        return total
