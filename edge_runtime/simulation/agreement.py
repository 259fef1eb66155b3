"""Whether models agree on what they share: the cosine between their classes' mean steps of a round, tensor by tensor."""

from collections import defaultdict
from itertools import combinations

import numpy as np
from edge_broker.journal import Update

from edge_runtime.aggregator.merge import STATE
from edge_runtime.methods.fedit import RunningMean
from edge_runtime.methods.interface import Contribution, Method
from edge_runtime.protocol import codec
from edge_runtime.protocol.keys import kind_of


def cosines(updates: list[Update], method: Method) -> list[float]:
    """Of every pair of classes and tensor that crosses them, where both have moved it; entries that only one of them holds
    count as 0 in the other."""
    kinds = {kind for kind in method.merges if kind in STATE and method.scope(kind) == "fleet"}
    running: dict[str, RunningMean] = defaultdict(RunningMean)
    deltas = []
    largest: codec.Tensors = {}
    for update in updates:
        delta = codec.decode(update.payload.read_bytes(), lambda key: kind_of(key) in kinds)
        deltas.append(Contribution(largest, delta, update.manifest.samples, update.manifest.model_class))
        for key, value in delta.items():
            if key not in largest or value.size > largest[key].size:
                largest[key] = np.zeros(value.shape, np.float32)
    for made in deltas:
        running[made.model_class].add(made)
    found = []
    for one, other in combinations((of.mean() for _, of in sorted(running.items())), 2):
        for key in sorted(one.keys() & other.keys()):
            lengths = float(np.linalg.norm(one[key]) * np.linalg.norm(other[key]))
            if lengths:
                found.append(float((one[key] * other[key]).sum()) / lengths)
    return found
