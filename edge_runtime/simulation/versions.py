"""The node of a run: global versions, how far a round moves them, and whether models agree."""

from collections import defaultdict
from itertools import combinations
from pathlib import Path

import numpy as np
from edge_broker import messages
from edge_broker.journal import Update
from safetensors.numpy import load_file

from edge_runtime.aggregator import check, merge
from edge_runtime.aggregator.store import Version
from edge_runtime.methods.fedit import RunningMean
from edge_runtime.methods.interface import Contribution, Method
from edge_runtime.protocol import codec
from edge_runtime.protocol.keys import STATE, parse
from edge_runtime.protocol.round import CODEC, FLEET
from edge_runtime.settings import Fleet
from edge_runtime.simulation.results import mean, short
from edge_runtime.trainer.job import Job


class Versions:
    """The latest version of each model class."""

    def __init__(self, fleet: Fleet, method: Method, folder: Path) -> None:
        self.fleet, self.method, self.folder = fleet, method, folder
        self.by_class: dict[str, Version] = {}
        self.moved: list[float] = []  # as an Outcome has it
        self.cosines: list[tuple[float, float]] = []  # as an Outcome has it
        self._updates: list[Update] = []  # of the round
        # Shapes of the tensors that devices have sent, by model class.
        self._shapes: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)

    def latest(self, model_class: str) -> Version | None:
        """The version that devices of a class start from; None before the first merge."""
        return self.by_class.get(model_class, self.by_class.get(FLEET))

    def take(self, payload: Path, device: str, job: Job, samples: int) -> None:
        """Check an update as a node does, and keep it for the merge."""
        model_class = job.facts.model_class
        delta = check.check(payload.read_bytes(), self._shapes[model_class], self.fleet, self.method)
        self._shapes[model_class] |= {key: value.shape for key, value in delta.items()}
        origin = messages.Origin(
            fleet=self.fleet.name,
            device=device,
            round=job.round,
            model_class=model_class,
            codec=CODEC,
            samples=samples,
        )
        self._updates.append(Update(messages.describe(payload, origin, payload.stat().st_size), payload))

    def merge(self, round_: int) -> None:
        """Make the next versions of the round's updates, if there are any."""
        updates, self._updates = self._updates, []
        if not updates:
            return
        pairs = cosines(updates, self.method)
        if pairs:
            below_0 = sum(pair < 0 for pair in pairs) / len(pairs)
            self.cosines.append((short(mean(pairs)), short(below_0)))
        merged = merge.merge(updates, self.by_class, self.fleet, self.method, round_, self.folder)
        # the same product in other factors would count as a move
        if not self.method.refactored:
            self.moved.append(short(sum(map(self._moved_by, merged))))
        self.by_class |= {version.model_class: version for version in merged}

    def _moved_by(self, version: Version) -> float:
        """Squared norm of a version's difference to the version before it."""
        total, before = 0.0, self.by_class.get(version.model_class)
        old = load_file(before.master) if before is not None else {}
        for key, value in load_file(version.master).items():
            if parse(key).kind in STATE:
                start = old.get(key)
                start = merge.version_0(key, value.shape, self.fleet, self.method) if start is None else start
                total += float(((value - start) ** 2).sum(dtype="float64"))
        return total


def cosines(updates: list[Update], method: Method) -> list[float]:
    """Cosines of two classes' mean steps, for each pair of classes and tensor that both moved.

    A tensor of a lower rank counts as 0 in the entries that it does not have.
    """
    kinds = {kind for kind in method.merges if kind in STATE and method.scope(kind) == "fleet"}
    steps: dict[str, RunningMean] = defaultdict(RunningMean)
    contributions = []
    largest: codec.Tensors = {}  # zeros, by key
    for update in updates:
        delta = codec.decode(update.payload.read_bytes(), lambda key: parse(key).kind in kinds)
        manifest = update.manifest
        contributions.append(Contribution(largest, delta, manifest.samples, manifest.model_class))
        for key, value in delta.items():
            if key not in largest or value.size > largest[key].size:
                largest[key] = np.zeros(value.shape, np.float32)
    # in a second loop, as a mean needs `largest` complete
    for contribution in contributions:
        steps[contribution.model_class].add(contribution)
    angles = []
    for first, second in combinations((step.mean() for _, step in sorted(steps.items())), 2):
        for key in sorted(first.keys() & second.keys()):
            lengths = float(np.linalg.norm(first[key]) * np.linalg.norm(second[key]))
            if lengths:
                angles.append(float((first[key] * second[key]).sum()) / lengths)
    return angles
