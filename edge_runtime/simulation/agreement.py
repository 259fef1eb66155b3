"""Cosines between model classes' mean steps: whether models agree on the tensors they share."""

from collections import defaultdict
from itertools import combinations

import numpy as np
from edge_broker.journal import Update

from edge_runtime.methods.fedit import RunningMean
from edge_runtime.methods.interface import Contribution, Method
from edge_runtime.protocol import codec
from edge_runtime.protocol.keys import STATE, kind_of


def cosines(updates: list[Update], method: Method) -> list[float]:
    """The cosine of each pair of classes and each tensor of the fleet, where both classes moved it.

    A tensor of a lower rank counts as 0 in the entries that it does not have.
    """
    kinds = {kind for kind in method.merges if kind in STATE and method.scope(kind) == "fleet"}
    steps: dict[str, RunningMean] = defaultdict(RunningMean)
    contributions = []
    largest: codec.Tensors = {}  # zeros, by key
    for update in updates:
        delta = codec.decode(update.payload.read_bytes(), lambda key: kind_of(key) in kinds)
        manifest = update.manifest
        contributions.append(Contribution(largest, delta, manifest.samples, manifest.model_class))
        for key, value in delta.items():
            if key not in largest or value.size > largest[key].size:
                largest[key] = np.zeros(value.shape, np.float32)
    for contribution in contributions:  # a mean needs `largest` complete
        steps[contribution.model_class].add(contribution)
    angles = []
    for first, second in combinations((mean.mean() for _, mean in sorted(steps.items())), 2):
        for key in sorted(first.keys() & second.keys()):
            lengths = float(np.linalg.norm(first[key]) * np.linalg.norm(second[key]))
            if lengths:
                angles.append(float((first[key] * second[key]).sum()) / lengths)
    return angles
